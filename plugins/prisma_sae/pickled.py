"""Modules that files pickle whole, as the core's reader returns them: their classes, and their tensors by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from prisma_core.plugin import SavedObject, read_objects


def outline(path: Path) -> tuple[Any, set[str]]:
    """Return what a pickled file holds, without numbers, and the full names of the classes in it.

    Raises:
        LoadError: it is no such file, or damaged.
    """
    names: set[str] = set()

    def note(name: str) -> bool:
        names.add(name)
        return True

    return read_objects(path, note, outline=True), names


def tensors_in(module: SavedObject) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module by dotted name, those of a part used twice once."""
    return dict(_tensors(module, "", set()))


def _tensors(module: SavedObject, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    seen.add(id(module))
    held = module.attributes
    for kind in ("_parameters", "_buffers"):
        for name, value in (held.get(kind) or {}).items():
            if isinstance(value, Tensor):
                yield prefix + name, value.detach()
    for name, part in (held.get("_modules") or {}).items():
        if isinstance(part, SavedObject) and id(part) not in seen:
            yield from _tensors(part, f"{prefix}{name}.", seen)
