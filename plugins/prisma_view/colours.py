"""Colours that stay apart for colour-blind eyes too."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Colour = tuple[int, int, int]

# Okabe and Ito's set ("Color Universal Design", 2008), four of Paul Tol's muted set, and a light grey.
CLASSES: tuple[Colour, ...] = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (51, 34, 136), (68, 170, 153), (136, 34, 85), (153, 153, 51), (187, 187, 187),
)  # fmt: skip
QUIET = CLASSES[-1]
"""Of what looks grey, such as empty ground: drawn fainter than the rest."""
REST: Colour = (120, 120, 128)
"""Of classes too rare to have a colour of their own."""

# Stops of viridis (Smith and van der Walt, matplotlib), dark to light.
SCALE: tuple[Colour, ...] = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
    (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip
MORE: Colour = (213, 94, 0)
LESS: Colour = (0, 114, 178)


def assign(classes: Sequence[int], look: Callable[[int], Colour | None]) -> dict[int, Colour]:
    """Return a colour for each class, the most important first: the nearest one left to what its emoji looks like.

    Args:
        look: the main colour of a class's emoji, or None where that is not known.
    """
    left = list(CLASSES)
    given: dict[int, Colour] = {}
    for index in classes:
        seen = look(index)
        nearest = min(left, key=lambda colour: _far(colour, seen)) if left and seen else (left or [REST])[0]
        given[index] = nearest
        left = [colour for colour in left if colour != nearest]
    return given


def _far(one: Colour, other: Colour) -> int:
    return sum(weight * (a - b) ** 2 for weight, a, b in zip((2, 4, 3), one, other, strict=True))
