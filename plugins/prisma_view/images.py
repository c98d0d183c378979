"""Images under patches: from whatever holds one to bytes inside a page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from prisma_core import InputError
from prisma_core.plugin import open_image


def as_image(image: Any) -> Image.Image:
    """Return an image as Pillow's, in RGB.

    Args:
        image: a path, a Pillow image, an array ``[height width channel]``, or a tensor ``[channel height width]`` as
            ``model.preprocess`` makes it (a batch of one is taken too), whose values are stretched to black and white.

    Raises:
        InputError: it is none of these.
    """
    if not isinstance(image, Tensor):
        return open_image(image).convert("RGB")
    pixels = image.detach().float().cpu()
    pixels = pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise InputError(f"Expected an image [channel height width] of 1 or 3 channels, got {list(image.shape)}.")
    low, high = pixels.min(), pixels.max()
    scaled = ((pixels - low) / (high - low).clamp_min(1e-12) * 255).round().byte().expand(3, -1, -1)
    return Image.fromarray(np.ascontiguousarray(scaled.permute(1, 2, 0).numpy()))


def as_images(image: Any, frames: int) -> tuple[Image.Image, ...]:
    """Return an image, or of a video ``[1 frame channel height width]`` the first one of each frame of patches.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(image, Tensor) or image.ndim != 5 or len(image) != 1:
        return (as_image(image),)
    return tuple(as_image(image[0, frame * image.shape[1] // frames]) for frame in range(frames))


def data_uri(image: Image.Image) -> str:
    """Return an image as a data URI."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=88, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
