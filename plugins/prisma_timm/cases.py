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

from prisma_core.errors import UnsupportedArchitecture
from prisma_core.maps.reader import Reader, qualified_name
from prisma_core.plugin.adapter import Adapter
from prisma_core.plugin.case import Case, Pictures
from prisma_timm.hooked.mapping import FamilyMap

HEADS, WIDTH, GRID = 3, 16, (3, 4)  # heads, the width of one, rows and columns of patches


# What initialisation does to tensors in place. Without data it would only cost time, and most of the time at that.
DRAWING = {"add_", "clamp_", "copy_", "div_", "erfinv_", "fill_", "mul_", "normal_", "uniform_", "zero_"}
DRAWING |= {"kaiming_uniform_", "kaiming_normal_"}


class WithoutData(TorchFunctionMode):
    """Leaves tensors without data as they are where initialisation would draw their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in DRAWING:
            drawn = args[0] if args else (kwargs or {}).get("tensor")
            if getattr(drawn, "is_meta", False):
                return drawn
        return func(*args, **(kwargs or {}))


def cases(adapters: Sequence[Adapter]) -> Iterator[Case]:
    """Yield a case for every architecture in timm's registry that one of the adapters takes.

    Each is built once without data, which says whether its adapter can represent it.
    """
    by_type = types_of(adapters)
    for module in timm.list_modules():
        if any(f"{kind.__module__}.{kind.__qualname__}" in by_type for kind in _classes(module)):
            for name in timm.list_models(module=module):
                if (found := case(name, by_type)) is not None:
                    yield found


def types_of(adapters: Sequence[Adapter]) -> dict[str, Adapter]:
    """Return adapters by the types they take."""
    return {name: adapter for adapter in adapters for name in adapter.types}


def case(name: str, adapters: Mapping[str, Adapter]) -> Case | None:
    """Return the case of one architecture, or None if no adapter, given by the types they take, can represent it."""
    if not timm.is_model(name):
        return None
    home = timm.model_entrypoint(name).__module__
    for kind in _classes(home.rpartition(".")[2]):
        adapter = adapters.get(f"{kind.__module__}.{kind.__qualname__}")
        if isinstance(adapter, FamilyMap) and kind.__module__ == home:  # all of such a family have the same parts
            build = partial(timm.create_model, name, pretrained=False, **adapter.small)
            return Case(name, build=build, full=partial(full, name), pictures=pictures)
    if not _taken(_outline(name), adapters):
        return None
    return Case(name, build=partial(small, name), full=partial(full, name), pictures=pictures)


def _classes(module: str) -> Iterator[type]:
    return (value for value in vars(sys.modules[f"timm.models.{module}"]).values() if isinstance(value, type))


def _outline(name: str) -> nn.Module:
    """Return an architecture with few blocks and no data."""
    # Where heads for keys and values are given layer by layer, two layers need two numbers, or one for both.
    return _first(name, [{"depth": 2}, {"depth": 2, "num_kv_heads": 1}, {}])[0]


def _first(name: str, options: Sequence[dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    """Return an architecture without data, built with the first arguments its constructor takes, and those."""
    for given in options[:-1]:
        try:
            with torch.device("meta"), WithoutData():
                return timm.create_model(name, pretrained=False, **given), given
        except (TypeError, AssertionError, ValueError, RuntimeError):  # constructors refuse in their own ways
            continue
    with torch.device("meta"), WithoutData():
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
    depth = {"depth": 2} if len(getattr(_tower(model), "blocks", ())) == 2 else {}
    image = {"img_size": _image_size(model), **_positions(model)}
    narrow = {"embed_dim": HEADS * WIDTH, "num_heads": HEADS}
    grouped = {"num_kv_heads": (HEADS, 1)}
    tried = [narrow | image, narrow | image | grouped, image, narrow, {}]
    return _first(name, [depth | given for given in tried])[1]


def _tower(model: nn.Module) -> nn.Module:
    """Return the module that holds blocks and patches: the model, or what a classifier wraps."""
    return getattr(model, "encoder", model)


def _image_size(model: nn.Module) -> tuple[int, int]:
    """Return the size of an image that has ``GRID`` patches."""
    tower = _tower(model)
    embed: Any = getattr(tower, "patch_embed", None) or tower.embeds
    ratio = getattr(embed, "feature_ratio", (1, 1))
    return (GRID[0] * embed.patch_size[0] * ratio[0], GRID[1] * embed.patch_size[1] * ratio[1])


def _positions(model: nn.Module) -> dict[str, Any]:
    """Return arguments for models that keep positions for a grid of their own, whatever the image."""
    kept = [part.pos_embed_grid_size for part in model.modules() if hasattr(part, "pos_embed_grid_size")]
    if not kept:
        return {}
    grid = 5 if isinstance(kept[0], int) else (5, 3)
    return {"pos_embed_grid_size": grid, "pretrained_cfg_overlay": {"input_size": (3, *_image_size(model))}}


def pictures(model: nn.Module) -> Pictures:
    """Return our preprocessing for a model, and timm's."""
    from timm.data import create_transform, resolve_model_data_config

    from prisma_timm.source import preprocess

    config = resolve_model_data_config(model)
    return Pictures(preprocess(config), create_transform(**config))
