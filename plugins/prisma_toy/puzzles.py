"""Two small tasks on which circuits are easy to find, in our own simple versions of Prisma's ideas.

Circle: say in which cell of a grid the centre of a circle lies, or how big it is. Induction: an image is a sequence
of patches read row by row, each filled with one of a few glyphs; the last patch repeats an earlier one, and the label
is the glyph that followed that one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prisma_toy.shapes import KINDS, coverage

CIRCLE_SIZE, CIRCLE_GRID, CIRCLE_SIZES = 32, 4, 5
GLYPHS: tuple[str, ...] = ("circle", "square", "diamond", "triangle", "star", "heart", "crescent", "cross")
EMOJI: tuple[str, ...] = ("⚪", "⬜", "🔷", "🔺", "⭐", "🤍", "🌙", "➕")  # noqa: RUF001
CELL, ROWS = 8, 4
INDUCTION_SIZE = CELL * ROWS

_GLYPH_KIND = torch.tensor([KINDS.index(glyph) for glyph in GLYPHS])


def circles(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw circles.

    Returns:
        images ``[batch 1 32 32]``, the grid cell of each centre ``[batch]``, and each size's class ``[batch]``.
    """
    x, y = torch.rand(n, generator=generator), torch.rand(n, generator=generator)
    size = torch.randint(CIRCLE_SIZES, (n,), generator=generator)
    radius = 0.10 + 0.07 * size
    # Centres keep clear of the lines between cells, where the label would be a matter of rounding.
    x, y = (_clear_of_lines(place) for place in (x, y))
    covered = coverage(torch.full((n,), KINDS.index("circle")), x, y, radius, torch.zeros(n), CIRCLE_SIZE)
    cell = (y * CIRCLE_GRID).long() * CIRCLE_GRID + (x * CIRCLE_GRID).long()
    noise = 0.05 * torch.randn(n, 1, CIRCLE_SIZE, CIRCLE_SIZE, generator=generator)
    return (covered[:, None] + noise).clamp(0, 1), cell, size


def _clear_of_lines(place: Tensor, margin: float = 0.08) -> Tensor:
    cell = (place * CIRCLE_GRID).floor()
    return (cell + margin + (1 - 2 * margin) * (place * CIRCLE_GRID - cell)) / CIRCLE_GRID


def induction(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw sequences of glyphs, each with one earlier occurrence of its last glyph.

    Returns:
        images ``[batch 1 32 32]``, the glyph to predict ``[batch]``, and the sequences ``[batch position]``.
    """
    length = ROWS * ROWS
    last = torch.randint(len(GLYPHS), (n, 1), generator=generator)
    others = torch.randint(1, len(GLYPHS), (n, length), generator=generator)
    sequence = (last + others) % len(GLYPHS)
    first = torch.randint(length - 2, (n, 1), generator=generator)
    sequence.scatter_(1, first, last)
    sequence[:, -1:] = last
    target = sequence.gather(1, first + 1)[:, 0]
    kind = _GLYPH_KIND[sequence.flatten()]
    half, radius, flat = torch.full((len(kind),), 0.5), torch.full((len(kind),), 0.48), torch.zeros(len(kind))
    cells = coverage(kind, half, half, radius, flat, CELL).view(n, ROWS, ROWS, CELL, CELL)
    return cells.permute(0, 1, 3, 2, 4).reshape(n, 1, INDUCTION_SIZE, INDUCTION_SIZE), target, sequence
