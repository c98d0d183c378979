"""Flat shapes as signed distances, drawn antialiased and many at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def _disc(x: Tensor, y: Tensor, radius: float = 1.0) -> Tensor:
    return torch.hypot(x, y) - radius


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x, y, 0.9)


def _ellipse(x: Tensor, y: Tensor) -> Tensor:
    """A good estimate near the edge: the implicit function over the length of its gradient."""
    a, b = 1.0, 0.55
    radius = torch.sqrt((x / a) ** 2 + (y / b) ** 2).clamp_min(1e-6)
    slope = torch.sqrt((x / a**2) ** 2 + (y / b**2) ** 2).clamp_min(1e-6)
    return radius * (radius - 1.0) / slope


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.8, 0.8)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() / 0.72 + y.abs() - 1.0) * (0.72 / math.hypot(1.0, 0.72))


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """The tip up, which is towards negative y."""
    return torch.maximum(x.abs() * math.cos(math.pi / 6) - (y + 1.0) * 0.5, y - 0.7)


def _star(x: Tensor, y: Tensor, inner: float = 0.45) -> Tensor:
    """Five points: the plane is folded onto one half of one point, whose edge is a line."""
    wedge = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (torch.remainder(angle + wedge / 2, wedge) - wedge / 2).abs()
    radius = torch.hypot(x, y)
    across, along = radius * torch.sin(angle), radius * torch.cos(angle)
    tip, notch = (0.0, 1.0), (inner * math.sin(wedge / 2), inner * math.cos(wedge / 2))
    edge = (notch[0] - tip[0], notch[1] - tip[1])
    length = math.hypot(*edge)
    return -((across - tip[0]) * edge[1] - (along - tip[1]) * edge[0]) / length


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """A square on its corner, and a disc on each of its upper edges."""
    side = 0.58
    y = y - 0.08
    turned_x, turned_y = (x + y) / math.sqrt(2), (y - x) / math.sqrt(2)
    lobe = side / math.sqrt(2)
    lobes = torch.minimum(_disc(x - lobe, y + lobe, side), _disc(x + lobe, y + lobe, side))
    return torch.minimum(_box(turned_x, turned_y, side, side), lobes)


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_disc(x, y, 0.95), -_disc(x + 0.42, y + 0.08, 0.72))


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.9, 0.3), _box(x, y, 0.3, 0.9))


SHAPES: dict[str, Distance] = {
    "circle": _circle,
    "ellipse": _ellipse,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "crescent": _crescent,
    "cross": _cross,
}
KINDS = tuple(SHAPES)


def _plain(x: Tensor, y: Tensor) -> Tensor:
    return torch.ones_like(x)


def _stripes(x: Tensor, y: Tensor, period: float = 0.5) -> Tensor:
    return (torch.remainder(y, period) - period / 2).abs() - period / 4


def _dots(x: Tensor, y: Tensor, pitch: float = 0.52, radius: float = 0.17) -> Tensor:
    x, y = torch.remainder(x, pitch) - pitch / 2, torch.remainder(y, pitch) - pitch / 2
    return _disc(x, y, radius)


def _rim(x: Tensor, y: Tensor) -> Tensor:
    return -_disc(x, y, 0.6)


def _continents(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(
        _disc(x - 0.35, y + 0.4, 0.42), torch.minimum(_disc(x + 0.45, y - 0.1, 0.36), _disc(x - 0.3, y - 0.5, 0.26))
    )


def _leaf(x: Tensor, y: Tensor) -> Tensor:
    return _disc(x - 0.2, y + 0.65, 0.3)


PATTERNS: dict[str, Distance] = {
    "plain": _plain,
    "stripes": _stripes,
    "dots": _dots,
    "rim": _rim,
    "continents": _continents,
    "leaf": _leaf,
}


def coverage(
    kind: Tensor,
    x: Tensor,
    y: Tensor,
    radius: Tensor,
    angle: Tensor,
    size: int,
    table: Mapping[str, Distance] = SHAPES,
) -> Tensor:
    """Return how much of each pixel each shape covers, in 0..1: ``[shape height width]``.

    Args:
        kind: indices into ``table``: ``[shape]``.
        x, y: centres, where the canvas is 0..1 with y running down: ``[shape]``.
        radius: of the circle around the shape, in canvases: ``[shape]``.
        angle: in radians, clockwise: ``[shape]``.
        size: pixels of the canvas' side.
        table: what the kinds are; patterns run on without a border.
    """
    distances = list(table.values())
    ticks = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    covered = torch.zeros(len(kind), size, size)
    cos, sin = torch.cos(angle), torch.sin(angle)
    for index in kind.unique().tolist():
        of_kind = (kind == index).nonzero()[:, 0]
        r = radius[of_kind][:, None, None]
        dx = (ticks[None, None, :] - x[of_kind][:, None, None]) / r
        dy = (ticks[None, :, None] - y[of_kind][:, None, None]) / r
        c, s = cos[of_kind][:, None, None], sin[of_kind][:, None, None]
        distance = distances[index](dx * c + dy * s, dy * c - dx * s)
        covered[of_kind] = (0.5 - distance * r * size).clamp(0, 1)
    return covered
