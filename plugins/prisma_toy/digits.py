"""Handwritten digits: the set that scikit-learn ships, 1,797 real images of 8 x 8 pixels.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prisma_core import PluginError

SIZE = 8
N_IMAGES, HELD_OUT = 1797, 360
LABELS = tuple(f"{digit}\N{VARIATION SELECTOR-16}\N{COMBINING ENCLOSING KEYCAP} {digit}" for digit in range(10))


@lru_cache(maxsize=1)
def load() -> tuple[Tensor, Tensor]:
    """Return all images, pixels in 0..1 ``[example 1 8 8]``, and their digits ``[example]``, in a fixed random order.

    Raises:
        PluginError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PluginError(
            "The digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    data: Any = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order, None] / 16
    return images, torch.from_numpy(data.target).long()[order]


def split(training: bool) -> tuple[Tensor, Tensor]:
    """Return the images and digits of a split: the last ``HELD_OUT`` are never trained on."""
    part = slice(None, -HELD_OUT) if training else slice(-HELD_OUT, None)
    images, digits = load()
    return images[part], digits[part]


def draw(n: int, generator: torch.Generator, training: bool) -> tuple[Tensor, Tensor]:
    """Return ``n`` images with their digits; in training turned, moved and scaled a little."""
    images, digits = split(training)
    chosen = torch.randint(len(images), (n,), generator=generator)
    image, digit = images[chosen], digits[chosen]
    return (_moved(image, generator) if training else image), digit


def _moved(image: Tensor, generator: torch.Generator) -> Tensor:
    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(image), generator=generator)

    angle, size = between(-0.25, 0.25), between(0.9, 1.15)
    cos, sin = angle.cos() * size, angle.sin() * size
    rows = torch.stack(
        [torch.stack([cos, -sin, between(-0.2, 0.2)], -1), torch.stack([sin, cos, between(-0.2, 0.2)], -1)], 1
    )
    grid = F.affine_grid(rows, list(image.shape), align_corners=False)
    return F.grid_sample(image, grid, align_corners=False)
