"""Conformance cases: every architecture of timm's registry that an adapter takes, built small."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import timm
import torch
from torch import nn

from prisma_core.adapter import Adapter, Reader, qualified_name
from prisma_core.conformance.case import Case, Pictures
from prisma_core.errors import UnsupportedArchitecture

HEADS, WIDTH, GRID = 3, 16, (3, 4)


def cases(adapters: Sequence[Adapter]) -> Iterator[Case]:
    """Yield a case for every architecture in timm's registry that one of the adapters takes."""
    by_type = {name: adapter for adapter in adapters for name in adapter.types}
    for module in timm.list_modules():
        made_here = {f"{kind.__module__}.{kind.__qualname__}" for kind in _classes(module)}
        if not made_here & set(by_type):
            continue
        for name in timm.list_models(module=module):
            if _taken(name, by_type):
                yield Case(name, build=partial(small, name), full=partial(full, name), pictures=pictures)


def _classes(module: str) -> Iterator[type]:
    return (value for value in vars(sys.modules[f"timm.models.{module}"]).values() if isinstance(value, type))


def _taken(name: str, adapters: dict[str, Adapter]) -> bool:
    with torch.device("meta"):
        model = small(name)
    adapter = adapters.get(qualified_name(model))
    if adapter is None:
        return False
    try:
        adapter.spec(Reader(model))
    except UnsupportedArchitecture:
        return False
    return True


def full(name: str) -> nn.Module:
    """Return an architecture at its real size, at timm's own initialisation."""
    return timm.create_model(name, pretrained=False).eval()


def small(name: str) -> nn.Module:
    """Return an architecture with two blocks, narrow, for a small image that is not square.

    Where a constructor does not allow one of these, it is left out.
    """
    given, _ = _smallest(name)
    return timm.create_model(name, pretrained=False, **given).eval()


@cache
def _smallest(name: str) -> tuple[dict[str, Any], str]:
    """Return the most that timm lets be shrunk, tried on the meta device."""
    image = _image_size(name)
    narrow = {"embed_dim": HEADS * WIDTH, "num_heads": HEADS}
    reasons = ""
    for given in ({**narrow, "img_size": image}, {"img_size": image}, narrow, {}):
        try:
            timm.create_model(name, pretrained=False, device="meta", depth=2, **given)
        except (TypeError, AssertionError, ValueError, RuntimeError) as error:
            reasons += f"{given}: {error}\n"
            continue
        return {"depth": 2, **given}, reasons
    return {}, reasons


def _image_size(name: str) -> tuple[int, int]:
    """Return the size of an image that has ``GRID`` patches."""
    model = timm.create_model(name, pretrained=False, device="meta", depth=2)
    embed = getattr(model, "patch_embed", None) or model.embeds
    patch = embed.patch_size
    ratio = getattr(embed, "feature_ratio", (1, 1))
    return (GRID[0] * patch[0] * ratio[0], GRID[1] * patch[1] * ratio[1])


def pictures(model: nn.Module) -> Pictures:
    """Return our preprocessing for a model, and timm's."""
    from timm.data import create_transform, resolve_model_data_config

    from prisma_timm.source import preprocess

    config = resolve_model_data_config(model)
    return Pictures(preprocess(config), create_transform(**config))
