"""From pictures to the tensor a model takes, as data: the same after a trip through JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from prisma_core.errors import InputError
from prisma_core.spec import Facts

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "str | Path | Image | Tensor | Any"


class Preprocess(Facts):
    """Resize, crop, scale to 0..1, normalise.

    Attributes:
        size: height and width of the result.
        resize: what becomes ``size / crop``. ``shortest``: the side that lets the picture cover it. ``longest``: the
            side that lets it fit inside. ``squash``: both sides. Then the middle is cut out, or padded.
        crop: the share of the resized picture that is kept; above 1 there is padding around it.
        pad: the colour of padding: ``black``, or the ``mean``.
        interpolation: Pillow's filter.
        resampling: who applies it: ``pillow``, or torch to a tensor of bytes, antialiased; some bytes differ by one.
            ``torch_float``: torch, to pixels in 0..1 that are not rounded to bytes in between.
        corner: where half a pixel is left over, the cut starts at the even one of both, or at the first (``floor``).
        mean, std: per channel, of pixels in 0..1.
    """

    size: tuple[int, int]
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    crop: float = Field(default=1.0, gt=0)
    pad: Literal["black", "mean"] = "black"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    resampling: Literal["pillow", "torch", "torch_float"] = "pillow"
    corner: Literal["even", "floor"] = "even"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @model_validator(mode="after")
    def _filter(self) -> Preprocess:
        if self.resampling != "pillow" and self.interpolation == "lanczos":
            raise ValueError("torch has no lanczos filter: use resampling='pillow'")
        if self.resampling == "torch_float" and (self.resize, self.crop) != ("squash", 1.0):
            raise ValueError("resampling='torch_float' goes with resize='squash' and crop=1")
        return self

    def __call__(self, picture: Picture | Sequence[Picture]) -> Tensor:
        """Return ``[batch channel height width]`` of one picture or a list of them.

        Args:
            picture: a path, a Pillow image, or an array or tensor ``[height width channel]`` or ``[height width]``
                (bytes, 16 bits, or floats in 0..1); or a list of those.

        Raises:
            InputError: it is no picture, or holds values that are not numbers.
        """
        if isinstance(picture, list | tuple):
            pictures = cast("Sequence[Picture]", picture)
            if not pictures:
                raise InputError("Expected at least one picture, got an empty list.")
            return torch.cat([self(one) for one in pictures])
        image = open_picture(picture, channels=len(self.mean))
        if self.resampling == "torch_float":
            pixels = self._interpolated(self._pixels(image)[None], *self.size)[0]
        else:
            pixels = self._pixels(self.fit(image))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((pixels - mean) / std)[None]

    def fit(self, image: Image) -> Image:
        """Return the part of a picture that the model sees, at the model's size."""
        from PIL import Image as images

        height, width = self._scaled(image.height, image.width)
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
        import numpy as np
        from PIL import Image as images

        array = np.asarray(image)
        pixels = torch.from_numpy(array.reshape(*array.shape[:2], -1).transpose(2, 0, 1).copy())[None]
        resized = self._interpolated(pixels, height, width)[0].permute(1, 2, 0).numpy()
        return images.fromarray(resized[:, :, 0] if array.ndim == 2 else resized)

    def _interpolated(self, pixels: Tensor, height: int, width: int) -> Tensor:
        smooth = self.interpolation in ("bilinear", "bicubic")
        mode = self.interpolation if smooth else "nearest-exact"  # as Pillow has it: the pixel whose middle is nearest
        return F.interpolate(pixels, (height, width), mode=mode, antialias=smooth)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """Return the size a picture is resized to. Source: torchvision's Resize, timm's ResizeKeepRatio."""
        rows, columns = (math.floor(side / self.crop) for side in self.size)
        if self.resize == "squash":
            return rows, columns
        if self.resize == "shortest" and rows == columns:
            # The shorter side exactly, the longer one rounded down.
            return (int(rows * height / width), rows) if width <= height else (rows, int(rows * width / height))
        ratio = (min if self.resize == "shortest" else max)(height / rows, width / columns)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _padded(self, image: Image) -> Image:
        """Return a picture at least as large as ``size``, padded evenly. Source: torchvision's CenterCrop."""
        from PIL import Image as images

        height, width = max(image.height, self.size[0]), max(image.width, self.size[1])
        if (image.height, image.width) == (height, width):
            return image
        colours = [round(255 * value) if self.pad == "mean" else 0 for value in self.mean]
        canvas = images.new(image.mode, (width, height), colours[0] if len(colours) == 1 else tuple(colours))
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas

    def _pixels(self, image: Image) -> Tensor:
        import numpy as np

        array = np.asarray(image)
        if array.ndim == 2:
            array = array[:, :, None]
        return torch.from_numpy(array.transpose(2, 0, 1).copy()).float() / 255

    def denormalise(self, pixels: Tensor) -> Tensor:
        """Return normalised pixels ``[... channel height width]`` in 0..1 again."""
        mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels * std + mean).clamp(0, 1)


def open_picture(picture: Picture, channels: int = 3) -> Image:
    """Return any picture as a Pillow image with the given number of channels (1 or 3), transparency on white.

    Raises:
        InputError: it is no picture.
    """
    from PIL import Image as images
    from PIL import ImageOps

    if isinstance(picture, str | Path):
        try:
            with images.open(picture) as opened:
                image = ImageOps.exif_transpose(opened)
                image.load()
        except FileNotFoundError as error:
            raise InputError(f"No picture at {picture}.") from error
        except (OSError, SyntaxError, ValueError, images.DecompressionBombError) as error:
            raise InputError(f"{picture} is not a picture that Pillow can read: {error}") from error
    elif isinstance(picture, images.Image):
        image = picture
    else:
        image = _from_array(picture)
    return _flattened(image).convert("L" if channels == 1 else "RGB")


def _flattened(image: Image) -> Image:
    from PIL import Image as images

    if image.mode.startswith("I"):  # 16 bits; Pillow opens some such files with 32
        import numpy as np

        return _from_array(np.asarray(image).clip(0, 65535).astype(np.uint16))
    if image.mode == "F":
        import numpy as np

        return _from_array(np.asarray(image))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = images.new("RGBA", rgba.size, (255, 255, 255, 255))
        return images.alpha_composite(white, rgba)
    return image


def _from_array(picture: Any) -> Image:
    import numpy as np
    from PIL import Image as images

    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().numpy()
    if not isinstance(picture, np.ndarray):
        raise InputError(
            f"Expected a path, a Pillow image, an array or a tensor, got {type(cast(object, picture)).__name__}."
        )
    array = cast("np.ndarray[Any, np.dtype[Any]]", picture)
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(
            "Expected pixels [height width] or [height width channel] with 1, 3 or 4 channels, "
            f"got {list(array.shape)}."
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"The picture holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite.")
        if array.min() < 0 or array.max() > 1:
            raise InputError(
                f"Expected floating point pixels in 0..1, got {array.min():.3g}..{array.max():.3g}. "
                "A tensor that is normalised already goes to the model directly."
            )
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == np.uint16:
        array = (array // 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"Expected pixels as uint8, uint16 or floats in 0..1, got {array.dtype}.")
    return images.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
