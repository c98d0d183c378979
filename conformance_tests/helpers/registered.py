"""A model with registers, and images for it."""

from __future__ import annotations

import torch
from prisma_conformance.randomise import randomise
from torch import Tensor

from prisma_core import HookedViT, ModelSpec
from prisma_core.spec import (
    DualSpec,
    Interpolation,
    NormSpec,
    PoolSpec,
    RopeSpec,
    TextSpec,
)
from prisma_core.transformer import HookedDual, build

LN = NormSpec(eps=1e-3)


def vit(registers: int = 2, pool: PoolSpec | None = None, *, rope: bool = True, bias: bool = True) -> HookedViT:
    """Return a three-layer model in float64 whose every number is random."""
    facts = {"scale": 0.4, "bias": bias, "d_mlp": 20, "act": "relu", "registers": registers, "n_classes": 5}
    spec = ModelSpec.plain(
        layers=3,
        image=(12, 16),
        norm=LN,
        rope=RopeSpec(layout="half") if rope else None,
        interpolation=None if rope or bias else Interpolation(),
        pool=pool or "token",
        **facts,
    )
    model = randomise(HookedViT(spec).double(), torch.Generator().manual_seed(1)).eval()
    if rope:  # as all rotary models are: prefix tokens are not turned
        model.rope_cos.data[: spec.layout.n_prefix] = 1
        model.rope_sin.data[: spec.layout.n_prefix] = 0
    return model


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 12, 16, generator=torch.Generator().manual_seed(2)).double()


def two_towers() -> HookedDual:
    text = TextSpec.plain(n_ctx=4, n_vocab=9, blocks=vit(bias=False).spec.blocks, ln_final=None, n_classes=5)
    made = build(DualSpec(vision=vit().spec, text=text))
    assert isinstance(made, HookedDual)
    return made.double().eval()
