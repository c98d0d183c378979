"""From a model's own image processor to our preprocessing: as data where it resizes, cuts and normalises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prisma_core.plugin import (
    SIZES,
    ImagePreprocess,
    Images,
    InputError,
    Preprocess,
    PrismaError,
    Reader,
    VideoPreprocess,
    installed,
    probe,
)
from prisma_hf.making import BROKEN
from prisma_hf.processors import Processed, Scale

FILTERS: dict[int, Literal["nearest", "lanczos", "bilinear", "bicubic"]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}


def found(folder: Path, model: nn.Module, common: dict[str, Any]) -> ImagePreprocess | VideoPreprocess | None:
    """Return what the processor that lies beside a model does, or None if there is none.

    What a model of videos makes of it, its adapter says; None as well if the adapter cannot.
    """
    from transformers import AutoImageProcessor, AutoVideoProcessor

    video, image = (_read(kind, folder, common) for kind in (AutoVideoProcessor, AutoImageProcessor))
    try:
        adapter = installed().adapter(model)
        answers = (adapter.preprocess(Reader(model), one) for one in (video, image) if one is not None)
        made = next((one for one in answers if one is not None), None)
    except PrismaError:  # the model is there all the same
        return None
    return made if made is not None or image is None else preprocess(image)


def _read(kind: Any, folder: Path, common: dict[str, Any]) -> Any:
    try:
        return kind.from_pretrained(folder, **common)
    except (*BROKEN, ImportError, AttributeError, TypeError):
        return None  # no file of one, or its library is not installed: the model is there all the same


def preprocess(processor: Any) -> ImagePreprocess:
    """Return what a processor does to an image: as data where that says it all, else by calling the processor."""
    return as_data(processor) or Processed(processor)


def as_data(processor: Any) -> Preprocess | None:
    """Return what a processor does to an image, or None if it is more than resizing, cutting and normalising.

    Its settings say what to expect; images that go both ways say whether that is all.
    """
    probes = [probe(*size) for size in SIZES]
    called = Processed(processor)
    try:
        candidates = list(_candidates(processor, called))
        theirs = [called(image)[0] for image in probes if candidates]
    except (InputError, TypeError, ValueError, AttributeError):  # it makes no image, or its settings are none we know
        return None
    for ours in candidates:
        if all(_agree(ours(image)[0], made) for image, made in zip(probes, theirs, strict=True)):
            return ours
    return None


def _candidates(processor: Any, called: Processed) -> Iterator[Preprocess]:
    """Yield what a processor's settings may mean."""
    filtering = FILTERS.get(getattr(processor, "resample", None))
    scaled = _size(getattr(processor, "size", None) or {}) if getattr(processor, "do_resize", True) else None
    if scaled is None or filtering is None:
        return
    resize, rows, columns = scaled
    cut = dict((getattr(processor, "do_center_crop", None) and getattr(processor, "crop_size", None)) or {})
    size = (int(cut.get("height") or rows), int(cut.get("width") or columns))
    resampling = "torch" if any(kind.__name__ == "TorchvisionBackend" for kind in type(processor).__mro__) else "pillow"
    if resampling == "torch" and filtering == "lanczos":
        filtering = "bicubic"  # torch has no lanczos
    base = Preprocess(
        size=size,
        resize=resize,
        interpolation=filtering,
        resampling=resampling,
        corner="floor",
        **_tidy(processor, called.scale)._asdict(),
    )
    share = getattr(processor, "crop_pct", None)
    if share is not None:  # resized to more than its size; not so where the size is large
        yield base.model_copy(update={"resize": "shortest", "crop": float(share)})
        yield base.model_copy(update={"resize": "squash"})
    crop = _crop(size, (rows, columns))
    if crop is None:
        return
    yield base.model_copy(update={"crop": crop})
    if (resize, crop) == ("squash", 1.0):
        if resampling == "torch":
            yield base.model_copy(update={"resampling": "torch_float"})  # if it scales before it resizes
        yield base.model_copy(update={"resize": "longest", "pad": "mean"})
        yield base.model_copy(update={"resize": "longest"})


def _tidy(processor: Any, scale: Scale) -> Scale:
    """Return a scale with the numbers that the settings give, where they are the same but for rounding."""
    factor = 255 * float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 255.0
    normal = getattr(processor, "do_normalize", False)
    n = len(scale.mean)
    mean, std = (processor.image_mean, processor.image_std) if normal else ((0.0,) * n, (1.0,) * n)
    values_each = [tuple(float(value) / factor for value in values) for values in (_each(mean, n), _each(std, n))]
    same = all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-5)
        for ours, theirs in zip(values_each, scale[:2], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    return Scale(values_each[0], values_each[1], scale.order) if same else scale


def _each(value: Any, n: int) -> Sequence[float]:
    return value if isinstance(value, list | tuple) else (value,) * n


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs, rtol=0, atol=1e-5))


def _size(size: Any) -> tuple[Literal["shortest", "squash"], int, int] | None:
    sides = {name: value for name, value in dict(size).items() if value}  # absent ones are None
    if set(sides) == {"shortest_edge"}:
        return "shortest", int(sides["shortest_edge"]), int(sides["shortest_edge"])
    if set(sides) == {"height", "width"}:
        return "squash", int(sides["height"]), int(sides["width"])
    return None


def _crop(size: tuple[int, int], scaled: tuple[int, int]) -> float | None:
    """Return the share of the resized image that is kept, or None if one number does not say it."""
    shares = [(cut / whole) * (1 - 1e-12 * step) for cut, whole in zip(size, scaled, strict=True) for step in (0, 1)]
    fits = (share for share in shares if tuple(math.floor(side / share) for side in size) == scaled)
    return next(fits, None)


def images(processor: Any) -> Images:
    """Return our preprocessing and upstream's own, for the check that compares them."""
    return Images(preprocess(processor), reference(processor))


def reference(processor: Any) -> Callable[[Any], Tensor]:
    """Return a function from a Pillow image to what upstream makes of it ``[channel height width]``."""

    def made(image: Any) -> Tensor:
        return torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"][0])

    return made
