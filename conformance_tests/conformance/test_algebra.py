"""Every hook point of every canonical model has an equation, and holds what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prisma_conformance.checks.algebra import equations
from prisma_conformance.checks.equations import edited_pass
from prisma_conformance.randomise import randomise
from twins import twin

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
from prisma_core.transformer.attention import Attention, HeadInputs
from prisma_core.transformer.block import Block
from prisma_core.transformer.norm import Norm

LN, RMS = NormSpec(eps=1e-3), NormSpec(kind="rms", eps=1e-2)


@torch.no_grad()
def all_hold(model: ZooModel) -> None:
    given = model.sample_inputs(2, generator=torch.Generator().manual_seed(2))
    inputs = tuple(x.double() if x.is_floating_point() else x for x in given)
    hold_on_a_plain_pass(model, inputs)
    assert not wrong_when_edited(model, inputs)


def hold_on_a_plain_pass(model: ZooModel, inputs: tuple[torch.Tensor, ...]) -> None:
    """With and without the derived activations."""
    for names in groups(model):
        _, cache = model.run_with_cache(*inputs, names=names)
        errors = equations(model, inputs, cache.store)
        assert {point for point, _ in errors} == set(names)
        wrong = {f"{point} = {equation}": error for (point, equation), error in errors.items() if not error <= 1e-10}
        assert not wrong


def wrong_when_edited(model: ZooModel, inputs: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Evaluate the equations of passes in which every hook point is edited; return those that fail.

    One pass leaves the derived points out, for the model computes other things then.
    """
    wrong: dict[str, float] = {}
    for names in groups(model):
        before, after = edited_pass(model, inputs, names, torch.Generator().manual_seed(3))
        errors = equations(model, inputs, after, before)
        assert set(names) - {point for point, _ in errors} <= {"hook_pos_embed"}  # full_embed's equation reads it
        wrong |= {f"{point} = {equation}": error for (point, equation), error in errors.items() if not error <= 1e-10}
    return wrong


def groups(model: ZooModel) -> tuple[list[str], list[str]]:
    points = model.hook_points()
    return list(points), [name for name, point in points.items() if not point.derived]


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


MLP_INPUT = """x = computed(self.hook_resid_mid, add, x, attn_out)
        if kind == "post":
            x = self.ln1(x)
        mlp_out = self.mlp(self.ln2(x) if kind == "pre" else x)"""
BRANCH = """x, kind = self.hook_resid_pre(x), self.spec.kind
        (inputs,) = head_inputs(x, self.spec, self.hook_q_input, self.hook_k_input, self.hook_v_input)
        normed = x
        if kind in ("pre", "parallel"):
            normed = self.ln1(x)
            inputs = inputs.after(self.ln1, x, normed)"""
TWINS = {
    "the MLP reads the stream before its hooks": (
        Block,
        MLP_INPUT,
        "unedited = add(x, attn_out)\n        " + MLP_INPUT.replace("ln2(x)", "ln2(unedited)"),
    ),
    "the stream goes on past its hooks": (
        Block,
        BRANCH,
        BRANCH.replace("x, kind = self", "kept, x, kind = x, self") + "\n        x = kept",
    ),
    "values past their hooks": (
        Attention,
        "q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)",
        "q, k, v = self.hook_q(q), self.hook_k(k), (self.hook_v(v) + v) / 2",
    ),
    "a norm by its own scale": (
        Norm,
        "_divided(self.spec, x, scale, self.weight",
        "_divided(self.spec, x, _inverse(self.spec, centred).reciprocal(), self.weight",
    ),
    "inputs of heads past the hooks of the norm": (
        HeadInputs,
        "apply(each) + change",
        "apply(each)",
    ),
    "values past the hooks of their heads' inputs": (
        Attention,
        "parts[index] = projected + bias",
        "parts[index] = (projected + bias + parts[index]) / 2",
    ),
    "results of heads past their hooks": (
        Attention,
        "show(self.hook_result, result, flat.dtype).sum(2)",
        "((show(self.hook_result, result, flat.dtype) + result) / 2).sum(2)",
    ),
}


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_a_place_past_which_an_edit_goes_is_seen(name: str, make: Any, image: Any, monkeypatch: Any) -> None:
    """Each twin computes the same on a plain pass."""
    kind, right, wrong = TWINS[name]
    model = make()
    assert not wrong_when_edited(model, (image,))
    copy = twin(kind, right, wrong)
    for method in ("forward", "_explicit", "_project", "after"):
        if hasattr(kind, method):
            monkeypatch.setattr(kind, method, getattr(copy, method))
    hold_on_a_plain_pass(model, (image,))
    assert wrong_when_edited(model, (image,))
