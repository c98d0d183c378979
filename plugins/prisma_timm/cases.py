"""Conformance cases: every architecture of timm's registry that an adapter takes, built small."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prisma_core.adapter import Adapter, Reader, qualified_name
from prisma_core.conformance.case import Case, Pictures
from prisma_core.errors import UnsupportedArchitecture

HEADS, WIDTH, GRID = 3, 16, (3, 4)  # heads, the width of one, rows and columns of patches


# What initialisation does to tensors in place. Without data it would only cost time, and most of the time at that.
DRAWING = {f"{name}_" for name in "add clamp copy div erfinv fill mul normal uniform zero".split()}


class _WithoutData(TorchFunctionMode):
    """Leaves tensors without data as they are where initialisation would draw their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in DRAWING and args and getattr(args[0], "is_meta", False):
            return args[0]
        return func(*args, **(kwargs or {}))


def cases(adapters: Sequence[Adapter]) -> Iterator[Case]:
    """Yield a case for every architecture in timm's registry that one of the adapters takes.

    Each is built once without data, which says whether its adapter can represent it.
    """
    by_type = {name: adapter for adapter in adapters for name in adapter.types}
    for module in timm.list_modules():
        if any(f"{kind.__module__}.{kind.__qualname__}" in by_type for kind in _classes(module)):
            for name in timm.list_models(module=module):
                if _taken(_outline(name), by_type):
                    yield Case(name, build=partial(small, name), full=partial(full, name), pictures=pictures)


def _classes(module: str) -> Iterator[type]:
    return (value for value in vars(sys.modules[f"timm.models.{module}"]).values() if isinstance(value, type))


def _outline(name: str) -> nn.Module:
    """Return an architecture with few blocks and no data."""
    return _first(name, [{"depth": 2}, {}])[0]


def _first(name: str, options: Sequence[dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    """Return an architecture without data, built with the first arguments its constructor takes, and those."""
    for given in options[:-1]:
        try:
            with torch.device("meta"), _WithoutData():
                return timm.create_model(name, pretrained=False, **given), given
        except (TypeError, AssertionError, ValueError, RuntimeError):  # constructors refuse in their own ways
            continue
    with torch.device("meta"), _WithoutData():
        return timm.create_model(name, pretrained=False, **options[-1]), options[-1]


def _taken(model: nn.Module, adapters: Mapping[str, Adapter]) -> bool:
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

    What a constructor does not allow is left as it is.
    """
    return timm.create_model(name, pretrained=False, **_smallest(name)).eval()


@cache
def _smallest(name: str) -> dict[str, Any]:
    """Return arguments that shrink an architecture as far as its constructor lets it be."""
    model = _outline(name)
    depth = {"depth": 2} if len(getattr(model, "blocks", ())) == 2 else {}
    image = {"img_size": _image_size(model)}
    narrow = {"embed_dim": HEADS * WIDTH, "num_heads": HEADS}
    return _first(name, [{**depth, **narrow, **image}, {**depth, **image}, {**depth, **narrow}, depth])[1]


def _image_size(model: nn.Module) -> tuple[int, int]:
    """Return the size of an image that has ``GRID`` patches."""
    embed: Any = getattr(model, "patch_embed", None) or model.embeds
    ratio = getattr(embed, "feature_ratio", (1, 1))
    return (GRID[0] * embed.patch_size[0] * ratio[0], GRID[1] * embed.patch_size[1] * ratio[1])


def pictures(model: nn.Module) -> Pictures:
    """Return our preprocessing for a model, and timm's."""
    from timm.data import create_transform, resolve_model_data_config

    from prisma_timm.source import preprocess

    config = resolve_model_data_config(model)
    return Pictures(preprocess(config), create_transform(**config))
