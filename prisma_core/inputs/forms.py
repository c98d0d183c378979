"""Base class of preprocessing: as data, or by a library's code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from prisma_core.errors import InputError
from prisma_core.errors.arguments import shown, tensor
from prisma_core.inputs.opening import ImageLike, open_image

if TYPE_CHECKING:
    from PIL.Image import Image


class ImagePreprocess(ABC):
    """From images to ``[batch channel height width]``. ``Preprocess`` is the form that is data.

    A plugin may have another, which calls its library's own code; ``Source.keep`` and ``Source.kept`` then save it with
    a model.
    """

    @property
    @abstractmethod
    def channels(self) -> int:
        """Number of channels that an image is opened with, 1 or 3."""

    @abstractmethod
    def prepared(self, image: Image) -> Tensor:
        """Return ``[channel height width]`` of an image that is open and has the right channels."""

    @abstractmethod
    def seen(self, image: Image, side: int = 0) -> Image:
        """Return the part of an image that the model sees, to look at, with no side shorter than ``side``."""

    @abstractmethod
    def denormalise(self, pixels: Tensor) -> Tensor:
        """Return normalised pixels ``[... channel height width]`` in 0..1 again, red first."""

    def __call__(self, image: ImageLike | Sequence[ImageLike]) -> Tensor:
        """Return ``[batch channel height width]`` of one image or a list of them.

        Args:
            image: a path, a Pillow image, or an array or tensor ``[height width]``, ``[height width channel]`` or,
                where only that makes sense of the sizes, ``[channel height width]`` (bytes, 16 bits, or floats in
                0..1); or several of those, in a list or along a first axis.

        Raises:
            InputError: it is no image, holds values that are not numbers, or several come out in different sizes.
        """
        if getattr(image, "ndim", 0) == 4:
            image = list(cast("Sequence[ImageLike]", image))
        if not isinstance(image, list | tuple):
            return self.prepared(open_image(image, channels=self.channels))[None]
        images = cast("Sequence[Any]", image)
        if not images:
            raise InputError("Expected at least one image, got an empty list.")
        made = [self(open_image(cast(Any, one)) if isinstance(one, list | tuple) else one) for one in images]
        if len({one.shape[1:] for one in made}) > 1:
            sizes = ", ".join(" x ".join(map(str, one.shape[-2:])) for one in made[:5])
            raise InputError(
                f"These images come out in sizes of their own (height x width: {sizes}), and a batch has one. "
                "Give them one by one, or cut them to one size before."
            )
        return torch.cat(made)


def restored(pixels: Tensor, mean: Sequence[float], std: Sequence[float], order: Literal["rgb", "bgr"]) -> Tensor:
    """Return normalised pixels ``[... channel height width]`` in 0..1 again, red first."""
    if tensor(pixels, "normalised pixels").ndim < 3 or pixels.shape[-3] != len(mean):
        raise InputError(f"Expected normalised pixels [... {len(mean)} height width], got {shown(pixels)}.")
    if order == "bgr":
        pixels = pixels.flip(-3)
    mean_, std_ = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (mean, std))
    return (pixels * std_ + mean_).clamp(0, 1)
