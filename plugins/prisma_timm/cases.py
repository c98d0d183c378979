"""Conformance cases: every architecture of timm's registry that an adapter takes, built small."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import timm
from torch import nn

from prisma_core.plugin import (
    Adapter,
    Case,
    Images,
    InputError,
    Reader,
    Refusal,
    UnsupportedArchitecture,
    qualified_name,
)
from prisma_timm.building import create_without_data
from prisma_timm.hooked.mapping import FamilyMap
from prisma_timm.preprocessing import preprocess

HEADS, WIDTH, GRID = 3, 16, (3, 4)  # heads, the width of one, rows and columns of patches


def cases(adapters: Sequence[Adapter | Refusal]) -> Iterator[Case]:
    """Yield a case for every architecture in timm's registry that one of the adapters takes.

    Each is built once without data, which says whether its adapter can represent it.
    """
    by_type = types_of(adapters)
    for name in adapted_names(by_type):
        if (one := case(name, by_type)) is not None:
            yield one


def adapted_names(adapters: Container[str]) -> Iterator[str]:
    """Yield every architecture in a module of timm's that has a class some adapter takes, given by qualified name."""
    for module in timm.list_modules():
        if any(f"{kind.__module__}.{kind.__qualname__}" in adapters for kind in _classes(module)):
            yield from timm.list_models(module=module)


def types_of(adapters: Sequence[Adapter | Refusal]) -> dict[str, Adapter]:
    """Return adapters by the types they take."""
    return {name: adapter for adapter in adapters if isinstance(adapter, Adapter) for name in adapter.types}


def case(name: str, adapters: Mapping[str, Adapter]) -> Case | None:
    """Return the case of one architecture, or None if no adapter, given by the types they take, can represent it."""
    if not timm.is_model(name):
        return None
    home = timm.model_entrypoint(name).__module__
    for kind in _classes(home.rpartition(".")[2]):
        adapter = adapters.get(f"{kind.__module__}.{kind.__qualname__}")
        if isinstance(adapter, FamilyMap) and kind.__module__ == home:  # all of such a family have the same parts
            build = partial(timm.create_model, name, pretrained=False, **adapter.small)
            return Case(name, build=build, full=partial(full, name), images=images)
    if not _taken(_outline(name), adapters):
        return None
    return Case(name, build=partial(small, name), full=partial(full, name), images=images)


def _classes(module: str) -> Iterator[type]:
    return (value for value in vars(sys.modules[f"timm.models.{module}"]).values() if isinstance(value, type))


def _outline(name: str) -> nn.Module:
    """Return an architecture with few blocks and no data."""
    # Where heads for keys and values are given layer by layer, two layers need two numbers, or one for both.
    return _first(name, [{"depth": 2}, {"depth": 2, "num_kv_heads": 1}, {}])[0]


def _first(name: str, options: Sequence[dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    """Return an architecture without data, built with the first arguments its constructor takes, and those."""
    for arguments in options[:-1]:
        try:
            return create_without_data(name, arguments), arguments
        except (InputError, TypeError, AssertionError, ValueError, RuntimeError):  # a constructor's ways to refuse
            continue
    return create_without_data(name, options[-1]), options[-1]


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
    attempts = [narrow | image, narrow | image | grouped, image, narrow, {}]
    return _first(name, [depth | arguments for arguments in attempts])[1]


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


def images(model: nn.Module) -> Images:
    """Return our preprocessing for a model, and timm's."""
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    return Images(preprocess(config), create_transform(**config))
