"""Preprocessing by transformers' own image processors, where it is more than data can say."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from prisma_core.plugin import ImageLike, ImagePreprocess, InputError, LoadError, open_image, read_json, restored
from prisma_hf.making import brief
from prisma_hf.packing import Packing, grid_of, packing

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIG, PIXELS = "preprocessor_config.json", "pixel_values"
# What processors raise over an image that they want more than.
FAILS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError, ImportError)


class Scale(NamedTuple):
    """Arithmetic of a processor on pixels in 0..1: ``(pixels - mean) / std``, red first, then put in order."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: Literal["rgb", "bgr"]


class Processed(ImagePreprocess):
    """Calls an image processor of transformers.

    Attributes:
        processor: transformers' object.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __repr__(self) -> str:
        return f"{type(self.processor).__name__} of transformers, by its own code"

    @property
    def channels(self) -> int:
        means = getattr(self.processor, "image_mean", None)
        return 1 if isinstance(means, list | tuple) and len(means) == 1 else 3

    def tiles(self, image: ImageLike) -> Tensor:
        """Return all that upstream makes of one image ``[tile channel height width]``: its tiles, one a row.

        Raises:
            InputError: it is no image, or the processor makes something else than images of it.
        """
        made = self._call(open_image(image, channels=self.channels))
        if grid_of(made) is not None:
            return self._unpacked(made)[None]
        try:
            pixels = torch.as_tensor(made.pop(PIXELS, ())).float()
        except (ValueError, TypeError, RuntimeError) as error:  # tiles of several sizes
            raise self._other(f"makes what is no tensor ({brief(error)})") from error
        pixels = pixels[0] if pixels.ndim == 5 and len(pixels) == 1 else pixels
        if pixels.ndim != 4 or pixels.shape[1] != self.channels or _is_strip(pixels, made):
            raise self._other(f"makes no image [channel height width], but {_told(pixels, made)}")
        masks = [name for name, value in made.items() if name.endswith("mask") and not _whole(value)]
        if masks:
            raise self._other(f"hides a part of what it makes ({masks[0]}), and a tensor of pixels cannot say which")
        return pixels

    def prepared(self, image: Image) -> Tensor:
        tiles = self.tiles(image)
        if len(tiles) != 1:
            raise InputError(
                f"{self._name} makes {len(tiles)} tiles of this image, and a row of a batch holds one. "
                "model.preprocess.tiles(image) returns all of them, one a row."
            )
        return tiles[0]

    def seen(self, image: Image, side: int = 0) -> Image:
        from PIL import Image as images

        pixels = (self.denormalise(self.prepared(image)) * 255).round().byte()
        array = pixels.permute(1, 2, 0).contiguous().numpy()
        made = images.fromarray(array[:, :, 0] if len(pixels) == 1 else array)
        times = max(1, -(-side // min(made.size)))
        return made.resize((made.width * times, made.height * times), images.Resampling.BICUBIC)

    def save_pretrained(self, folder: Path) -> None:
        """Write what makes the processor again into a folder.

        Raises:
            LoadError: its class is not one of transformers' own.
        """
        kind = type(self.processor)
        if _kind(kind.__name__) is not kind:
            raise LoadError(f"{kind.__name__} is no class of transformers' own, and code is not saved")
        settings = json.loads(self.processor.to_json_string())
        settings["image_processor_type"] = kind.__name__  # transformers leaves out which of its two backends it is
        (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Processed:
        """Return what ``save_pretrained`` wrote.

        Raises:
            LoadError: it cannot be read.
        """
        settings = read_json(folder / CONFIG)
        name = settings.pop("image_processor_type", None)
        if name is None:
            raise LoadError(f"{folder / CONFIG} names no image_processor_type, as transformers' own files do.")
        kind = _kind(name)
        if kind is None:
            raise LoadError(
                f"The installed transformers has no image processor {name!r}, which {folder / CONFIG} names."
            )
        try:
            return cls(kind(**settings))
        except FAILS as error:
            raise LoadError(f"{folder / CONFIG} makes no {name}: {brief(error)}") from error

    def denormalise(self, pixels: Tensor) -> Tensor:
        return restored(pixels, *self.scale)

    @cached_property
    def scale(self) -> Scale:
        """Map of a pixel's value, measured on images of one colour: settings do not say it all."""
        black, white, red = (self._made_of(colour) for colour in ("black", "white", "red"))
        if bool((white == black).any()):
            return Scale((0.0,) * len(white), (1.0,) * len(white), "rgb")
        bgr = len(white) == 3 and int(((red - black) / (white - black)).argmax()) == 2
        if bgr:
            black, white = black.flip(0), white.flip(0)
        std = 1 / (white - black)
        mean = -black * std + 0.0
        tidy = [tuple(float(f"{value:.7g}") for value in values.tolist()) for values in (mean, std)]
        return Scale(*tidy, "bgr" if bgr else "rgb")

    def _made_of(self, colour: str) -> Tensor:
        from PIL import Image as images

        made = self.tiles(images.new("RGB", (64, 64), colour))[0].double()
        return made[:, made.shape[1] // 2, made.shape[2] // 2]

    def _call(self, image: Image) -> dict[str, Any]:
        try:
            made = self.processor(images=image, return_tensors="pt")
        except FAILS as error:
            raise self._other(f"cannot prepare an image by itself ({brief(error)})") from error
        if isinstance(made, Tensor):
            return {PIXELS: made}
        named = [name for name in made if PIXELS in name]
        alone = named[0] if len(named) == 1 else PIXELS  # some call them pixel_values_images, or so
        return {PIXELS if name == alone else name: value for name, value in made.items()}

    @cached_property
    def _packing(self) -> Packing | None:
        return packing(self._call, self.processor, self.channels)

    def _unpacked(self, made: dict[str, Any]) -> Tensor:
        image = self._packing and self._packing.image(made, self.channels)
        if image is None:
            raise self._other("packs patches in an order in which they make no image")
        return image

    @property
    def _name(self) -> str:
        return f"transformers' {type(self.processor).__name__}"

    def _other(self, what: str) -> InputError:
        return InputError(f"{self._name} {what}: set model.preprocess, or give the model the tensor it takes.")


def _is_strip(pixels: Tensor, made: dict[str, Any]) -> bool:
    """Whether patches stand side by side, in one row, with the numbers of rows and columns beside them."""
    sides = made.get("target_sizes")
    return isinstance(sides, Tensor) and int(sides[0].prod()) * pixels.shape[-2] == pixels.shape[-1]


def _whole(mask: Any) -> bool:
    return isinstance(mask, Tensor) and bool(mask.all())


def _told(pixels: Tensor, made: dict[str, Any]) -> str:
    parts = ["pixel_values " + " x ".join(map(str, pixels.shape))] if pixels.numel() else []
    return ", ".join([*parts, *made]) or "nothing"


def _kind(name: object) -> Any:
    """Return a class of image processors by its name, or None. Of other names transformers would return anything."""
    from transformers import BaseImageProcessor
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    kind = get_image_processor_class_from_name(name) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseImageProcessor) else None
