"""Images of any kind, opened."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from torch import Tensor

from prisma_core.errors import InputError
from prisma_core.errors.arguments import shown
from prisma_core.files.texts import check_regular

if TYPE_CHECKING:
    from PIL.Image import Image

ImageLike: TypeAlias = "str | Path | Image | Tensor | Any"
# What Pillow decodes by itself. It would hand PostScript to Ghostscript, a program that runs what the file says.
_FORMATS = "PNG JPEG MPO WEBP GIF BMP DIB PPM TIFF AVIF HEIF JXL JPEG2000 ICO QOI SGI TGA"
FORMATS = tuple(_FORMATS.split())
_CHANNELS = (1, 3, 4)


def open_image(image: ImageLike, channels: int = 3) -> Image:
    """Return any image as a Pillow image with the given number of channels (1 or 3).

    However it is given, it is turned as its EXIF data say, and transparency lies on white.

    Raises:
        InputError: it is no image.
    """
    from PIL import Image as images

    if isinstance(image, str | Path):
        opened = _read(image)
    elif isinstance(image, images.Image):
        form = getattr(image, "format", None)
        if form not in (None, *FORMATS) and getattr(image, "tile", None):  # opened, and not decoded yet
            raise InputError(f"This image is a file of {form}, which is not decoded here: {_EXPECTED}")
        try:
            image.load()
        except Exception as error:  # decoders stumble in any way there is
            closed = "its file is closed: call image.load() while it is open, or give the path"
            why = closed if getattr(image, "fp", image) is None else error
            raise InputError(f"This image of {image.width} x {image.height} cannot be decoded: {why}.") from error
        opened = image
    else:
        opened = _from_array(image)
    return _flattened(opened).convert("L" if channels == 1 else "RGB")


_EXPECTED = f"expected {', '.join(FORMATS[:6])} or another format that runs no program. Save it as PNG."


def _read(given: str | Path) -> Image:
    from PIL import Image as images
    from PIL import ImageOps

    images.init()
    path = os.path.expanduser(given)
    if re.match(r"[a-z][a-z0-9]+:/|data:", str(given)) and not os.path.lexists(path):
        raise InputError(f"{shown(str(given))} is an address: expected a file. Download the image first.")
    if os.path.isdir(path):
        raise InputError(f"{path!r} is a folder: give an image, or a list, as in sorted(Path(FOLDER).iterdir()).")
    try:
        os.stat(path)  # of an empty name Path makes the folder
        check_regular(Path(path))
        with images.open(path, formats=[form for form in FORMATS if form in images.OPEN]) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
            return image
    except FileNotFoundError as error:
        raise InputError(f"No image at {str(given)!r}.") from error
    except images.UnidentifiedImageError as error:
        raise InputError(f"{str(path)!r} is no image that Pillow may read: {_EXPECTED}") from error
    except Exception as error:  # over damaged bytes decoders stumble in any way there is
        raise InputError(f"{str(path)!r} is not an image that Pillow can read: {error}") from error


def _flattened(image: Image) -> Image:
    """Return an image as a viewer shows it: turned as its EXIF data say, and its transparency on white."""
    from PIL import Image as images
    from PIL import ImageOps

    try:
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, TypeError) as error:  # data that are damaged
        raise InputError(f"EXIF data that cannot be read ({error}). Remove them: del image.info['exif'].") from error
    if image.mode.startswith(("I", "F")):
        import numpy as np

        pixels = np.asarray(image)  # of whole numbers 16 bits; Pillow opens some such files with 32
        return _from_array(pixels if image.mode == "F" else pixels.clip(0, 65535).astype(np.uint16))
    if image.mode == "LAB":
        raise InputError("Pillow has no colours of LAB images: convert this one with PIL.ImageCms before.")
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = images.new("RGBA", rgba.size, (255, 255, 255, 255))
        return images.alpha_composite(white, rgba)
    return image


_NORMALISED = "A tensor that is normalised already goes to the model directly."


def _instead(value: object) -> str:
    if isinstance(value, bytes) or hasattr(value, "read"):
        return " Open it: PIL.Image.open(io.BytesIO(DATA)), or of an open file PIL.Image.open(FILE)."
    if isinstance(value, Mapping):
        return " Of a row of a data set give the image alone, as in row['image']."
    if isinstance(value, list | tuple | int):
        pixels = "" if isinstance(value, int) else " Pixels go in as an array: numpy.asarray(image, dtype='uint8');"
        return f"{pixels} Several images go in as one flat list, without their labels."
    return " Several images go in as a list: list(images)." if hasattr(value, "__iter__") else ""


def _from_array(pixels: Any) -> Image:
    import numpy as np
    from PIL import Image as images

    if isinstance(pixels, Tensor):
        try:
            pixels = (pixels.float() if pixels.is_floating_point() else pixels).detach().cpu().numpy()
        except (RuntimeError, TypeError) as error:  # without data, sparse, quantised
            raise InputError(f"Expected a tensor of pixels, got {shown(pixels)} on {pixels.device}: {error}") from error
    if not isinstance(pixels, np.ndarray):
        raise InputError(
            f"Expected a path, a Pillow image, an array or a tensor, got {shown(pixels)}.{_instead(pixels)}"
        )
    array = cast("np.ndarray[Any, np.dtype[Any]]", pixels)
    if array.ndim == 3 and array.shape[0] in _CHANNELS and array.shape[2] not in _CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in _CHANNELS):
        raise InputError(
            "Expected pixels [height width], [height width channel] or [channel height width] with 1, 3 or 4 channels, "
            f"got {list(array.shape)}."
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"The image holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite.")
        if array.min() < 0 or array.max() > 1:
            bytes_ = array.min() >= 0 and 1 < array.max() <= 255
            hint = "Pixels in 0..255 go in as bytes: pixels.astype('uint8')." if bytes_ else _NORMALISED
            raise InputError(
                f"Expected floating point pixels in 0..1, got {array.min():.3g}..{array.max():.3g}. {hint}"
            )
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype == np.uint16:
        array = (array // 257).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"Expected pixels as uint8, uint16 or floats in 0..1, got {array.dtype}.")
    return images.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
