"""From a model's own image processor to our preprocessing, where it resizes, cuts and normalises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from prisma_core.conformance.case import Pictures
from prisma_core.preprocess import Preprocess

FILTERS: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
# Smooth and sharp, both ways round, smaller and larger than what models take.
PROBES = ((61, 43), (43, 61), (481, 300))


def preprocess(processor: Any) -> Preprocess | None:
    """Return what a processor does to a picture, or None if it is more than resizing, cutting and normalising.

    Its settings say what to expect; pictures that go both ways say whether that is all.
    """
    ours = _expected(processor)
    if ours is None:
        return None
    candidates = [ours]
    if ours.resampling == "torch" and (ours.resize, ours.crop) == ("squash", 1.0):
        candidates.append(ours.model_copy(update={"resampling": "torch_float"}))  # if it scales before it resizes
    probes = [_probe(size) for size in PROBES]
    try:
        theirs = [reference(processor)(picture) for picture in probes]
    except (ValueError, TypeError, KeyError, RuntimeError):  # it wants more than a picture
        return None
    for one in candidates:
        if all(_agree(one(picture)[0], made) for picture, made in zip(probes, theirs, strict=True)):
            return one
    return None


def _expected(processor: Any) -> Preprocess | None:
    scaled = _size(getattr(processor, "size", None) or {}) if processor.do_resize else None
    cut = processor.crop_size if getattr(processor, "do_center_crop", None) else None
    if scaled is None or processor.resample is None or not math.isclose(_scale(processor), 1 / 255):
        return None
    resize, rows, columns = scaled
    size = (int(cut["height"]), int(cut["width"])) if cut is not None else (rows, columns)
    crop = _crop(size, (rows, columns))
    filtering = FILTERS.get(int(processor.resample))
    torch_resizes = any(kind.__name__ == "TorchvisionBackend" for kind in type(processor).__mro__)
    if crop is None or filtering is None or (torch_resizes and filtering == "lanczos"):
        return None
    normal = processor.do_normalize
    return Preprocess(
        size=size,
        resize=resize,
        crop=crop,
        interpolation=filtering,
        resampling="torch" if torch_resizes else "pillow",
        corner="floor",
        mean=tuple(processor.image_mean) if normal else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if normal else (1.0, 1.0, 1.0),
    )


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=0, atol=1e-5))


def _probe(size: tuple[int, int]) -> Any:
    import numpy as np
    from PIL import Image

    width, height = size
    row, column = np.mgrid[0:height, 0:width]
    waves = 127.5 + 127.5 * np.sin(np.stack([column / 3 + row / 17, column / 11 - row / 2, row * column / 200], -1))
    return Image.fromarray(np.where((column // 16 + row // 16)[..., None] % 2, waves, 255 - waves).astype("uint8"))


def _scale(processor: Any) -> float:
    return float(processor.rescale_factor) if processor.do_rescale else 1.0


def _size(size: Any) -> tuple[Literal["shortest", "squash"], int, int] | None:
    given = {name: value for name, value in dict(size).items() if value}  # absent ones are None
    if set(given) == {"shortest_edge"}:
        return "shortest", int(given["shortest_edge"]), int(given["shortest_edge"])
    if set(given) == {"height", "width"}:
        return "squash", int(given["height"]), int(given["width"])
    return None


def _crop(size: tuple[int, int], scaled: tuple[int, int]) -> float | None:
    """Return the share of the resized picture that is kept, or None if one number does not say it."""
    shares = [(cut / whole) * (1 - 1e-12 * step) for cut, whole in zip(size, scaled, strict=True) for step in (0, 1)]
    fits = (share for share in shares if tuple(math.floor(side / share) for side in size) == scaled)
    return next(fits, None)


def pictures(processor: Any) -> Pictures:
    """Return our preprocessing and upstream's own, for the check that compares them."""
    ours = preprocess(processor)
    assert ours is not None
    return Pictures(ours, reference(processor))


def reference(processor: Any) -> Callable[[Any], Tensor]:
    """Return a function from a Pillow image to what upstream makes of it ``[channel height width]``."""

    def made(picture: Any) -> Tensor:
        return torch.as_tensor(processor(images=picture, return_tensors="pt")["pixel_values"][0])

    return made
