"""Every hook point of every canonical model has an equation, and holds what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prisma_conformance.checks.algebra import equations
from prisma_conformance.randomise import randomise

from prisma_core import HookedViT, TokenLayout
from prisma_core.spec import (
    AttentionSpec,
    DualSpec,
    EmbedSpec,
    Interpolation,
    MlpSpec,
    ModelSpec,
    NormSpec,
    PoolSpec,
    RopeSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.transformer import ZooModel, build

LN, RMS = NormSpec(eps=1e-3), NormSpec(kind="rms", eps=1e-2)


@torch.no_grad()
def all_hold(model: ZooModel) -> None:
    given = model.sample_inputs(2, generator=torch.Generator().manual_seed(2))
    inputs = tuple(x.double() if x.is_floating_point() else x for x in given)
    _, cache = model.run_with_cache(*inputs)
    errors = equations(model, inputs, cache.store)
    assert {point for point, _ in errors} == set(model.hook_points())
    wrong = {f"{point} = {equation}": error for (point, equation), error in errors.items() if not error <= 1e-10}
    assert not wrong


def test_of_each_kind_of_model(variant: HookedViT) -> None:
    all_hold(variant)


FACTS: dict[str, Any] = {"norm": LN, "scale": 0.4, "d_mlp": 20, "act": "quick_gelu", "pre_norm": LN, "n_classes": 10}


def vision(**facts: Any) -> ModelSpec:
    """A model that leaves the last row of pixels out."""
    embed = EmbedSpec(patch=(4, 4), norm=LN)
    return ModelSpec.plain(**FACTS | {"image": (17, 12), "embed": embed} | facts)


def text(**facts: Any) -> TextSpec:
    return TextSpec.plain(**FACTS | {"n_vocab": 50, "n_ctx": 9} | facts)


POOL = PoolSpec(
    kind="attention",
    attn=AttentionSpec(n_heads=3, n_kv_heads=3, d_head=5, scale=0.3, qk_norm=RMS),
    n_latents=4,
    latents="mean",
    d_latent=7,
    latent_norm=LN,
    mlp=MlpSpec(d_mlp=9, act="silu", gated=True, inner_norm=LN),
    norm=RMS,
)
SPECS = {
    "attention pooling": vision(pool=POOL, ln_pool=LN),
    "no head, patches": vision(pool=PoolSpec(kind="patches"), n_classes=None),
    "first and mean": vision(pool=PoolSpec(kind="token_and_avg"), d_pool=24),
    "factorized positions": vision(embed=EmbedSpec(patch=(4, 4), pos_factorized=True)),
    "positions of another grid": vision(
        embed=EmbedSpec(patch=(4, 4), pos_grid=(5, 6), interpolation=Interpolation(in_float32=False))
    ),
    "video": vision(
        image_size=(16, 12), embed=EmbedSpec(patch=(4, 4), tubelet=2), layout=TokenLayout(frames=3, rows=4, columns=3)
    ),
    "neighbours turned, all heads normed": vision(
        rope=RopeSpec(layout="interleaved", per_layer=True, per_head=True),
        qk_norm=RMS,
        qk_norm_over="all_heads",
    ),
    "causal text": text(),
    "padded text": text(causal=False, pad_id=0, pool=TextPoolSpec(kind="eos", eos_id=3), ln_pre=LN),
    "text with a suffix": text(pad_id=0, suffix=True, pad_lag=1, pool=TextPoolSpec(kind="last"), ln_pool=RMS),
    "all tokens of a text": text(pool=TextPoolSpec(kind="none"), n_classes=None),
    "dual": DualSpec(vision=vision(), text=text(), logit_bias=True),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_of_each_fact(spec: ModelSpec | TextSpec | DualSpec) -> None:
    all_hold(randomise(build(spec).double(), torch.Generator().manual_seed(1)).eval())
