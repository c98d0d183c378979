"""Conformance cases of Meta's layout: each generation, as its files have it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from prisma_core.plugin import Case, Images
from prisma_dino.meta import Architecture, MaskedLinear, MetaViT, RopePositions
from prisma_dino.source import MEAN, STD, preprocess

SMALL: dict[str, Any] = {"width": 24, "depth": 2, "heads": 3, "patch": (4, 4), "grid": (3, 3), "d_mlp": 40}
SECOND: dict[str, Any] = {"layer_scale": True, "mask_token": True, "in_float32": True}
THIRD: dict[str, Any] = {
    **SECOND,
    "registers": 3,
    "registers_name": "storage_tokens",
    "periods": 2,
    "masked_bias": True,
    "eps": 1e-5,
}


def meta_cases() -> Iterator[Case]:
    """Yield a case for each generation of Meta's files."""
    every: dict[str, dict[str, Any]] = {
        "meta_v1": {},
        "meta_v2": SECOND,
        "meta_v2_registers": {**SECOND, "registers": 2, "antialias": True, "offset": 0.0},
        "meta_v2_giant": {**SECOND, "mlp": "packed", "registers": 2, "antialias": True, "offset": 0.0},
        "meta_v3": THIRD,
        "meta_v3_plus": {**THIRD, "mlp": "split"},
        "meta_v3_7b": {**THIRD, "mlp": "split", "masked_bias": False, "qkv_bias": False, "local_norm": True},
    }
    for name, options in every.items():
        yield Case(name, build=partial(build, Architecture(**{**SMALL, **options})), images=images)


def build(arch: Architecture) -> nn.Module:
    """Return a model with the constants that its file would hold: rotary periods, and biases of keys masked."""
    model = MetaViT(arch).eval()
    for part in model.modules():
        if isinstance(part, RopePositions):
            part.periods.copy_(100.0 ** torch.linspace(0, 0.75, arch.periods))
        if isinstance(part, MaskedLinear):
            part.bias_mask[arch.width : 2 * arch.width] = 0
    return model


def images(model: nn.Module) -> Images:
    """Return our preprocessing, and the one that Meta's evaluations are written with."""
    from torchvision import transforms

    theirs = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return Images(preprocess(cast(MetaViT, model)), theirs)
