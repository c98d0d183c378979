"""Preprocessing facts of transformers' video and image processors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from prisma_core.plugin import Count, LoadError, Preprocess, VideoPreprocess, check_call, checked

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@checked
def preprocess_of(processor: Any, frames: Count) -> VideoPreprocess:
    """Return what a processor of transformers does to each frame, for a model that takes so many frames.

    Raises:
        LoadError: it does something we cannot repeat, such as leaving videos at a size of their own.
    """
    check_call(processor, 1, "processor=", "a processor of transformers", LoadError)
    crop, size = (_sides(getattr(processor, name, None)) for name in ("crop_size", "size"))
    if not getattr(processor, "do_center_crop", False):
        crop = {}
    final = crop or size
    if not getattr(processor, "do_resize", True) or not {"height", "width"} <= final.keys():
        raise _other(processor, "leaves frames at a size of their own")
    height, width = final["height"], final["width"]
    facts: dict[str, Any] = {}
    if crop and "shortest_edge" in size:
        if height != width:
            raise _other(processor, "cuts frames to a size that is not square")
        facts["crop"] = _share(height, size["shortest_edge"])
    elif crop and (size.get("height"), size.get("width")) != (height, width):
        raise _other(processor, "resizes frames to one shape and cuts another out of it")
    else:
        facts["resize"] = "squash"
    mean, std = _scale(processor)
    torchvision = any(kind.__name__ == "TorchvisionBackend" for kind in type(processor).__mro__)
    each = Preprocess(
        size=(height, width),
        interpolation=FILTERS[int(processor.resample)],
        resampling="torch" if torchvision else "pillow",
        corner="floor",
        mean=mean,
        std=std,
        **facts,
    )
    return VideoPreprocess(frames=frames, each=each)


def _sides(size: Any) -> dict[str, int]:
    """Return the sides that a size of transformers gives."""
    if isinstance(size, int):
        return {"height": size, "width": size}
    if size is None:
        return {}
    sides = size if isinstance(size, Mapping) else vars(size)
    return {name: int(side) for name, side in sides.items() if side is not None}


def _share(cut: int, whole: int) -> float:
    """Return the share of a frame that is kept, such that a frame of ``cut / share`` has ``whole``, rounded down."""
    share = cut / whole
    return share if math.floor(cut / share) == whole else math.nextafter(share, 0)


def _scale(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std of pixels in 0..1. What is subtracted before is seen on a black frame."""
    n = len(processor.image_mean) if isinstance(processor.image_mean, list | tuple) else 3
    factor = processor.rescale_factor * 255 if processor.do_rescale else 255.0
    mean, std = np.zeros(n), np.ones(n)
    if processor.do_normalize:
        mean, std = np.zeros(n) + processor.image_mean, np.zeros(n) + processor.image_std
    black = _made_of(processor, 0, n)
    for offset in (0.0, 1.0):
        centre, spread = (mean + offset) / factor, std / factor
        if np.allclose(black, -centre / spread, atol=1e-4):
            return tuple(map(float, centre)), tuple(map(float, spread))
    raise _other(processor, f"makes {black.tolist()} of black")


def _made_of(processor: Any, grey: int, channels: int) -> np.ndarray[Any, Any]:
    """Return what the processor makes of a frame all of one grey: a number for each channel."""
    frame = np.full((64, 64, channels), grey, dtype=np.uint8)
    made = processor([frame, frame], return_tensors="np")
    values = np.asarray(made["pixel_values"] if "pixel_values" in made else made["pixel_values_videos"])
    return values.reshape(2, channels, -1)[0, :, 0]


def _other(processor: Any, what: str) -> LoadError:
    return LoadError(f"{type(processor).__name__} {what}, which preprocessing here does not do: set model.preprocess.")
