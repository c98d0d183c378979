"""From images to the tensor a model takes, as data: the same after a trip through JSON."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from prisma_core.errors import InputError
from prisma_core.inputs.forms import ImagePreprocess, restored
from prisma_core.spec import Facts

if TYPE_CHECKING:
    from PIL.Image import Image


Side = Annotated[int, Field(gt=0, le=1 << 14)]
PIXELS = 1 << 28  # of a resized image, at most: what is asked for is far from what a file holds otherwise
Mean = Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], Field(min_length=1)]
Std = Annotated[tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...], Field(min_length=1)]  # finite in float32


class Preprocess(Facts, ImagePreprocess):
    """Resize, crop, scale to 0..1, normalise.

    Attributes:
        size: height and width of the result.
        resize: what becomes ``size / crop``. ``shortest``: the side that lets the image cover it. ``longest``: the
            side that lets it fit inside. ``squash``: both sides. Then the middle is cut out, or padded.
        crop: the share of the resized image that is kept; above 1 there is padding around it.
        pad: the colour of padding: ``black``, or the ``mean``.
        interpolation: Pillow's filter.
        resampling: who applies it: ``pillow``, or torch to a tensor of bytes, antialiased; some bytes differ by one.
            ``torch_float``: torch, to pixels in 0..1 that are not rounded to bytes in between.
        corner: where half a pixel is left over, the cut starts at the even one of both, or at the first (``floor``).
        mean, std: per channel, of pixels in 0..1; red first.
        order: of the channels in the result.
    """

    size: tuple[Side, Side]
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    crop: float = Field(default=1.0, ge=1 / PIXELS, allow_inf_nan=False)
    pad: Literal["black", "mean"] = "black"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    resampling: Literal["pillow", "torch", "torch_float"] = "pillow"
    corner: Literal["even", "floor"] = "even"
    mean: Mean = (0.5, 0.5, 0.5)
    std: Std = (0.5, 0.5, 0.5)
    order: Literal["rgb", "bgr"] = "rgb"

    @model_validator(mode="after")
    def _together(self) -> Preprocess:
        if self.resampling != "pillow" and self.interpolation == "lanczos":
            raise ValueError("torch has no lanczos filter: use resampling='pillow'")
        if self.resampling == "torch_float" and (self.resize, self.crop) != ("squash", 1.0):
            raise ValueError("resampling='torch_float' goes with resize='squash' and crop=1")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std are one number a channel each, got {len(self.mean)} and {len(self.std)}")
        return self

    @property
    def channels(self) -> int:
        return len(self.mean)

    def prepared(self, image: Image) -> Tensor:
        if self.resampling == "torch_float":
            pixels = self._interpolated(_bytes(image)[None].float() / 255, *self.size)[0]
        else:
            pixels = _bytes(self.fit(image)).float() / 255
        mean, std = (torch.tensor(values, device="cpu").view(-1, 1, 1) for values in (self.mean, self.std))
        pixels = (pixels - mean) / std
        return pixels.flip(0) if self.order == "bgr" else pixels

    def seen(self, image: Image, side: int = 0) -> Image:
        times = max(1, -(-side // min(self.size)))
        larger = self.model_copy(update={"size": (self.size[0] * times, self.size[1] * times)})
        return larger.fit(image)

    def fit(self, image: Image) -> Image:
        """Return the part of an image that the model sees, at the model's size."""
        from PIL import Image as images

        height, width = self._scaled(image.height, image.width)
        if not 0 < height * width <= PIXELS:
            raise InputError(
                f"An image of {image.height} x {image.width} would become {height} x {width} before it is cut to "
                f"{self.size[0]} x {self.size[1]}: cut it to a shape nearer to that first."
            )
        if (image.height, image.width) != (height, width):
            if self.resampling != "pillow":
                image = self._resized(image, height, width)
            else:
                image = image.resize((width, height), images.Resampling[self.interpolation.upper()])
        image = self._padded(image)
        start = math.floor if self.corner == "floor" else round
        top, left = start((image.height - self.size[0]) / 2), start((image.width - self.size[1]) / 2)
        return image.crop((left, top, left + self.size[1], top + self.size[0]))

    def _resized(self, image: Image, height: int, width: int) -> Image:
        """Source: torchvision's resize of tensors."""
        from PIL import Image as images

        resized = self._interpolated(_bytes(image)[None], height, width)[0].permute(1, 2, 0).numpy()
        return images.fromarray(resized[:, :, 0] if resized.shape[2] == 1 else resized)

    def _interpolated(self, pixels: Tensor, height: int, width: int) -> Tensor:
        smooth = self.interpolation in ("bilinear", "bicubic")
        mode = self.interpolation if smooth else "nearest-exact"  # as Pillow has it: the pixel whose middle is nearest
        if (height, width) == (1, 1):  # torch's kernel for bytes fails over one pixel in any other order of memory
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        return F.interpolate(pixels, (height, width), mode=mode, antialias=smooth)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return the size an image is resized to. Source: torchvision's Resize, timm's ResizeKeepRatio."""
        rows, columns = (max(1, math.floor(side / self.crop)) for side in self.size)
        if self.resize == "squash":
            return rows, columns
        if self.resize == "shortest" and rows == columns:
            # The shorter side exactly, the longer one rounded down.
            return (int(rows * height / width), rows) if width <= height else (rows, int(rows * width / height))
        ratio = (min if self.resize == "shortest" else max)(height / rows, width / columns)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _padded(self, image: Image) -> Image:
        """Return an image at least as large as ``size``, padded evenly. Source: torchvision's CenterCrop."""
        from PIL import Image as images

        height, width = max(image.height, self.size[0]), max(image.width, self.size[1])
        if (image.height, image.width) == (height, width):
            return image
        colours = [round(255 * value) if self.pad == "mean" else 0 for value in self.mean]
        canvas = images.new(image.mode, (width, height), colours[0] if len(colours) == 1 else tuple(colours))
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas

    def denormalise(self, pixels: Tensor) -> Tensor:
        return restored(pixels, self.mean, self.std, self.order)


def _bytes(image: Image) -> Tensor:
    """Return the bytes of an image: ``[channel height width]``."""
    import numpy as np

    array = np.asarray(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1).transpose(2, 0, 1).copy())
