"""One tiny canonical model of each kind, and all that a pass of it can do."""

from __future__ import annotations

from typing import Any

import torch
from prisma_conformance.randomise import randomise
from torch import Tensor

import prisma_core as prisma
from prisma_core import ActivationCache, HookContext
from prisma_core.spec import (
    AttentionSpec,
    DualSpec,
    EmbedSpec,
    Interpolation,
    ModelSpec,
    NormSpec,
    PoolSpec,
    RopeCount,
    RopeGrid,
    RopeSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.transformer import build

LN = NormSpec(eps=1e-3)


FACTS: dict[str, Any] = {"norm": LN, "scale": 0.4, "d_mlp": 10, "n_classes": 5}


def vision(**facts: Any) -> ModelSpec:
    given = FACTS | ({} if "embed" in facts else {"interpolation": Interpolation()})
    return ModelSpec.plain(**given | ({} if "layout" in facts else {"registers": 1}) | facts)


def text(**facts: Any) -> TextSpec:
    return TextSpec.plain(**FACTS | {"n_vocab": 30, "n_ctx": 7, "pad_id": 7} | facts)


FILM = {"layout": prisma.TokenLayout(cls=1, frames=2, rows=2, columns=3)}


KINDS: dict[str, ModelSpec | TextSpec | DualSpec] = {
    "positions resized": vision(),
    "positions by axis": vision(embed=EmbedSpec(patch=(4, 4), pos_factorized=True, interpolation=Interpolation())),
    "patches pooled by attention": vision(
        pool=PoolSpec(kind="attention", attn=AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.4))
    ),
    "turned by their place": vision(
        d_head=8, rope=RopeSpec(layout="half", grid=RopeGrid(coordinates="centred", waves=(1.0, 3.0)))
    ),
    "turned by a count": vision(
        d_head=8,
        rope=RopeSpec(
            layout="interleaved",
            grid=RopeGrid(coordinates="index", waves=(1.0, 3.0), reference=(2, 2), in_float32=True),
        ),
    ),
    "video": vision(**FILM, embed=EmbedSpec(patch=(4, 4), tubelet=2)),
    "video of any length": vision(
        **FILM,
        embed=EmbedSpec(patch=(4, 4), tubelet=2, pos=False, any_length=True),
        rope=RopeSpec(layout="interleaved", grid=RopeCount(pairs=1, theta=100.0, rows=2, columns=3)),
    ),
    "causal text": text(),
    "text read both ways": text(causal=False, pool=TextPoolSpec(kind="avg")),
    "text counted by its words": text(causal=False, pos_by_text=True, pool=TextPoolSpec(kind="first")),
    "text with an end": text(suffix=True, pool=TextPoolSpec(kind="last")),
    "text to its end": text(pool=TextPoolSpec(kind="eos", eos_id=3)),
    "images and texts": DualSpec(vision=vision(), text=text(), logit_bias=True),
}


def drawn(spec: ModelSpec | TextSpec | DualSpec) -> Any:
    return randomise(build(spec), torch.Generator().manual_seed(0)).eval()


def inputs_on(model: Any, device: torch.device | str, dtype: torch.dtype, **size: Any) -> tuple[Tensor, ...]:
    inputs = model.sample_inputs(2, generator=torch.Generator().manual_seed(1), **size)
    return tuple(x.to(device, dtype if x.is_floating_point() else None) for x in inputs)


def requests(model: Any) -> list[list[str]]:
    """Return names to cache at once: all plain points, then the derived ones."""
    points = model.hook_points()
    derived = [name for name, point in points.items() if point.derived]
    return [[name for name in points if name not in derived], *([derived] if derived else [])]


def passes(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Run all that a pass can do, and check the device and the dtype of every tensor."""

    def check(cache: ActivationCache) -> None:
        for name, x in cache.items():
            assert x.device == device, name
            assert x.dtype == dtype, name
            assert bool(torch.isfinite(x).any()), name

    def halved(x: Tensor, at: HookContext) -> Tensor:
        return x * 0.5

    def doubled(x: Tensor, at: HookContext) -> None:
        x.mul_(2)

    for size in model.sizes():
        assert model(*inputs_on(model, device, dtype, size=size)).device == device
    inputs = inputs_on(model, device, dtype)
    for names in requests(model):
        with torch.no_grad():
            output, cache = model.run_with_cache(*inputs, names=names)
        assert output.device == device
        assert output.dtype == dtype
        check(cache)
        hooks = {name: (halved, doubled)[index % 2] for index, name in enumerate(names)}
        assert model.run_with_hooks(*inputs, hooks=hooks).device == device
        _, cache = model.run_with_cache(*inputs, names=names, loss=lambda output: output.square().sum())
        check(cache.grad)
    tokens = [name for name, point in model.hook_points().items() if {"pos", "query_pos"} & set(point.axes.split())]
    _, cache = model.run_with_cache(*inputs, names=tokens[:3], pos=[0, -1])
    check(cache)
