"""Parts of files that several formats share: JSON, renamed tensors, references, token scopes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from prisma_core import LoadError
from prisma_core.plugin import SavedObject

MOST_VALUES = 100_000  # of a configuration; a pickle may hold one list in itself twice, over and over


def renamed(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], where: object, *, unread: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return tensors under other names, contiguous; ``.T`` behind a name transposes.

    Args:
        unread: names of others that a file may hold, which these need not.

    Raises:
        LoadError: one is missing, or there is another, which would be part of what a coder computes.
    """
    if missing := [name for name in names if name.removesuffix(".T") not in tensors]:
        held = ", ".join(sorted(tensors)[:12])
        raise LoadError(f"{where} lacks {', '.join(missing)}; it holds {held}.")
    if unknown := sorted(set(tensors) - {name.removesuffix(".T") for name in names} - set(unread)):
        raise LoadError(f"{where} holds {unknown[0]}, whose use this reader does not know: it would be left out.")
    return {
        new: (tensors[old.removesuffix(".T")].T if old.endswith(".T") else tensors[old]).detach().contiguous()
        for old, new in names.items()
    }


def plain(value: Any) -> Any:
    """Return a configuration as JSON holds it: objects by their attributes, dtypes as text.

    Raises:
        LoadError: it has more than ``MOST_VALUES`` values.
    """
    return _plain(value, iter(range(MOST_VALUES)))


def _plain(value: Any, left: Iterator[int]) -> Any:
    if next(left, None) is None:
        raise LoadError(f"A configuration holds more than {MOST_VALUES:,} values: refused.")
    if isinstance(value, SavedObject):
        return _plain(value.attributes, left)
    if isinstance(value, Mapping):
        return {str(key): _plain(each, left) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, left) for each in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__


_OPEN_CLIP = "open-clip:"


def reference_of(name: str | None) -> str | None:
    """Return Prisma's reference for a model named as SAE libraries name it; a name that is none of those as it is.

    >>> reference_of("open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K")
    'open_clip:hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K'
    >>> reference_of("facebook/dino-vitb16")
    'hf:facebook/dino-vitb16'
    """
    if not name:
        return None
    if name.startswith(_OPEN_CLIP):
        return f"open_clip:hf-hub:{name.removeprefix(_OPEN_CLIP)}"
    if name.startswith("wkcn/TinyCLIP"):
        return f"open_clip:hf-hub:{name}"
    return f"hf:{name}" if "/" in name and ":" not in name else name
