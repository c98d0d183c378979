"""Fields of a ``Preprocess`` with which it does what upstream's own transform does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from prisma_conformance.doctor.facts import choices, fields
from prisma_core.plugin import Preprocess, probe

CROPS = (1.0, 0.875, 0.9, 0.95, 0.96, 0.965, 0.94, 0.8)  # what libraries take
IMAGES = ((300, 517), (61, 43), (43, 61), (640, 480))
CLOSE = 1e-5
Reference = Callable[[Any], Tensor]


def mended(ours: Preprocess, reference: Reference) -> str | None:
    """Find the fields that have to be others, at most two beside ``size``, ``mean`` and ``std``; None if none help.

    Mean and standard deviation are not searched: they are solved for, from one image.

    >>> mended(Preprocess(size=(8, 8), std=(0.2, 0.2, 0.2)), Preprocess(size=(8, 8)).prepared)
    'std=(0.5, 0.5, 0.5) (it is (0.2, 0.2, 0.2))'
    """
    images = [probe(*size) for size in IMAGES]
    theirs = [reference(image) for image in images]
    height, width = theirs[0].shape[-2:]
    for update in _updates(ours):
        try:
            other = Preprocess.model_validate({**dict(ours), "size": (height, width), **update})
        except ValidationError:  # fields that do not go together
            continue
        if (found := _normalised(other, images, theirs)) is not None:
            names = [name for name, value in dict(found).items() if value != getattr(ours, name)]
            return ", ".join(f"{name}={getattr(found, name)!r} (it is {getattr(ours, name)!r})" for name in names)
    return None


def _updates(ours: Preprocess) -> Iterator[dict[str, Any]]:
    """Nothing, one field with another value, two fields."""
    single = [{"crop": crop} for crop in CROPS if crop != ours.crop]
    single += [{str(one.path[-1]): value} for one in fields(ours) for value in choices(one.kind, one.value)]
    yield {}
    yield from single
    yield from (one | other for one, other in combinations(single, 2) if one.keys() != other.keys())


def _normalised(other: Preprocess, images: list[Any], theirs: list[Tensor]) -> Preprocess | None:
    """The preprocessing with the mean and the standard deviation that make it agree on all images."""
    first = other.prepared(images[0])
    if first.shape != theirs[0].shape:
        return None
    if not _agrees(other, images[:1], theirs):
        factor = theirs[0].std((1, 2)) / first.std((1, 2))
        shift = theirs[0].mean((1, 2)) - factor * first.mean((1, 2))
        if other.order == "bgr":  # mean and std are red first
            factor, shift = factor.flip(0), shift.flip(0)
        std = torch.tensor(other.std) / factor
        mean = torch.tensor(other.mean) - shift * std
        values = {name: tuple(round(float(x), 4) for x in value) for name, value in (("mean", mean), ("std", std))}
        other = other.model_copy(update=values)
    return other if _agrees(other, images, theirs) else None


def _agrees(other: Preprocess, images: list[Any], theirs: list[Tensor]) -> bool:
    for image, their in zip(images, theirs, strict=False):
        ours = other.prepared(image)
        if ours.shape != their.shape or not float((ours - their).abs().max()) <= CLOSE:
            return False
    return True


__all__ = ["mended"]
