"""Sprites after the factors of the dSprites data set, drawn afresh; no file of that data set is used.

Shape (3), scale (6), orientation (40), x (32) and y (32) make one 64 x 64 image of ones on zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prisma_toy.shapes import KINDS, coverage

FACTORS: dict[str, int] = {"shape": 3, "scale": 6, "orientation": 40, "x": 32, "y": 32}
SHAPES: tuple[str, ...] = ("square", "ellipse", "heart")
SIZE = 64

_KIND = torch.tensor([KINDS.index(shape) for shape in SHAPES])


def sample(n: int, generator: torch.Generator) -> Tensor:
    """Return factors drawn at random, in the order of ``FACTORS``: ``[batch factor]``."""
    columns = [torch.randint(count, (n,), generator=generator) for count in FACTORS.values()]
    return torch.stack(columns, dim=1)


def draw(factors: Tensor) -> Tensor:
    """Return the images of factors, 0 or 1: ``[batch factor] -> [batch 1 64 64]``."""
    shape, scale, orientation, x, y = factors.unbind(1)
    radius = 0.2 * (0.5 + 0.1 * scale)
    angle = orientation * (2 * math.pi / FACTORS["orientation"])
    centres = (0.24 + 0.52 * place / (FACTORS["x"] - 1) for place in (x, y))
    covered = coverage(_KIND[shape], *centres, radius=radius, angle=angle, size=SIZE)
    return (covered > 0.5).float()[:, None]


def labels(factor: str) -> tuple[str, ...]:
    """Return the names of a factor's values."""
    if factor == "shape":
        return ("🟥 square", "🥚 ellipse", "🤍 heart")
    return tuple(f"{factor} {value}" for value in range(FACTORS[factor]))
