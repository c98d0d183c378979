"""Ground to draw on, and shapes laid over it: what the toy data share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Return numbers drawn evenly from ``low`` to ``high``."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def ground(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Return plain, shaded, blotched or striped ground of little colour: ``[batch 3 size size]``."""
    light = uniform((n, 1), 0.08, 0.95, generator)
    base = (light + uniform((n, 3), -0.06, 0.06, generator))[:, :, None, None]
    blotches = F.interpolate(
        torch.randn(n, 1, 7, 7, generator=generator), size=(size, size), mode="bicubic", align_corners=False
    )
    ticks = torch.linspace(-1, 1, size)
    turn = uniform((n, 1, 1, 1), 0, torch.pi, generator)
    along = ticks[None, None, None, :] * torch.cos(turn) + ticks[None, None, :, None] * torch.sin(turn)
    stripes = torch.sin(along * uniform((n, 1, 1, 1), 8, 40, generator))
    weights = torch.rand(n, 3, 1, 1, generator=generator) * (torch.rand(n, 3, 1, 1, generator=generator) < 0.5)
    texture = 0.10 * blotches * weights[:, :1] + 0.12 * along * weights[:, 1:2] + 0.06 * stripes * weights[:, 2:]
    return (base + texture).clamp(0, 1)


def paint(image: Tensor, covered: Tensor, colour: Tensor) -> Tensor:
    """Lay shapes over images, the last slot on top.

    Args:
        image: ``[batch channel height width]``.
        covered: how much of each pixel each shape covers: ``[batch slot height width]``.
        colour: ``[batch slot channel]``.
    """
    for slot in range(covered.shape[1]):
        alpha = covered[:, slot, None]
        image = image * (1 - alpha) + colour[:, slot, :, None, None] * alpha
    return image


def noisy(image: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Return images with noise of a strength of their own, up to ``most``, within 0..1."""
    strength = uniform((len(image), *[1] * (image.ndim - 1)), 0.0, most, generator)
    return (image + torch.randn(image.shape, generator=generator) * strength).clamp(0, 1)
