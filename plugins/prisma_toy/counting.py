"""The counting set: "2 apples and 2 apples: how many?", the simplest visual reasoning.

An image shows some fruit left of a plus and some right of it, one to four of a kind on each side. The label is how many
there are in all. Of the sixteen sums four are never shown in training, though other sums with the same total are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prisma_core.plugin import BriefRepr, Count, InputError, checked
from prisma_toy.canvas import ground, noisy, paint, uniform
from prisma_toy.shapes import KINDS, PATTERNS, coverage

SIZE, MOST = 48, 4
FRUIT: dict[str, tuple[str, str, tuple[float, float, float], tuple[float, float, float]]] = {
    "apple": ("circle", "leaf", (0.86, 0.14, 0.18), (0.20, 0.60, 0.22)),
    "lemon": ("ellipse", "plain", (0.97, 0.86, 0.20), (0.0, 0.0, 0.0)),
    "plum": ("circle", "plain", (0.50, 0.22, 0.66), (0.0, 0.0, 0.0)),
    "lime": ("ellipse", "stripes", (0.40, 0.76, 0.26), (0.20, 0.50, 0.16)),
}
KINDS_OF_FRUIT = tuple(FRUIT)
PATCH_LABELS = ("nothing", *KINDS_OF_FRUIT, "plus")
TOTALS = tuple(range(2, 2 * MOST + 1))
LABELS = tuple(f"{total}\N{VARIATION SELECTOR-16}\N{COMBINING ENCLOSING KEYCAP} {total}" for total in TOTALS)
SUMS = tuple((left, right) for left in range(1, MOST + 1) for right in range(1, MOST + 1))
HELD_OUT_SUMS = ((2, 2), (1, 4), (3, 3), (4, 3))
TRAINING_SUMS = tuple(each for each in SUMS if each not in HELD_OUT_SUMS)
SPLITS = {"train": TRAINING_SUMS, "held-out": HELD_OUT_SUMS, "all": SUMS}
Split = Literal["train", "held-out", "all"]

_SHAPE = torch.tensor([KINDS.index(shape) for shape, *_ in FRUIT.values()])
_PATTERN = torch.tensor([list(PATTERNS).index(pattern) for _, pattern, *_ in FRUIT.values()])
_COLOURS = torch.tensor([colours for _, _, *colours in FRUIT.values()])
_CELLS = torch.tensor([(x, y) for y in (0.18, 0.5, 0.82) for x in (0.11, 0.32)])
_SLOTS = 2 * MOST


@dataclass(frozen=True, repr=False)
class Sums(BriefRepr):
    """A batch of sums.

    Attributes:
        image: pixels in 0..1: ``[batch 3 48 48]``.
        numbers: of fruit left and right of the plus: ``[batch 2]``.
        kinds: index in ``KINDS_OF_FRUIT`` of those on the left and on the right: ``[batch 2]``.
        visible: how much of each pixel each fruit covers, the left ones first, and the plus: ``[batch 9 48 48]``.
    """

    image: Tensor
    numbers: Tensor
    kinds: Tensor
    visible: Tensor

    @property
    def total(self) -> Tensor:
        """How many there are in all: ``[batch]``."""
        return self.numbers.sum(1)

    @property
    def captions(self) -> tuple[str, ...]:
        """Each image in words, such as "2 apples and 1 plum"."""
        rows = zip(self.numbers.tolist(), self.kinds.tolist(), strict=True)
        return tuple(f"{_some(n[0], kind[0])} and {_some(n[1], kind[1])}" for n, kind in rows)

    @property
    def questions(self) -> tuple[str, ...]:
        """Each image as a question, such as "2 apples and 1 plum: how many?"."""
        return tuple(f"{each}: how many?" for each in self.captions)

    @checked
    def patch_classes(self, rows: Count) -> Tensor:
        """Return the index in ``PATCH_LABELS`` of what covers most of each patch of a grid: ``[batch row column]``."""
        covered = F.adaptive_avg_pool2d(self.visible, (rows, rows))
        of_slot = (1 + self.kinds).repeat_interleave(MOST, 1)
        of_slot = torch.cat([of_slot, torch.full((len(of_slot), 1), PATCH_LABELS.index("plus"))], 1)
        share = torch.zeros(len(covered), len(PATCH_LABELS), rows, rows)
        share.scatter_add_(1, of_slot[:, :, None, None].expand(-1, -1, rows, rows), covered)
        share[:, 0] = 1 - covered.sum(1)
        return share.argmax(1)


def _some(number: int, kind: int) -> str:
    return f"{number} {KINDS_OF_FRUIT[kind]}{'s' if number > 1 else ''}"


def draw(n: int, generator: torch.Generator, split: Split = "all") -> Sums:
    """Draw sums of a split, each as often as any other.

    Raises:
        InputError: there is no such split.
    """
    if split not in SPLITS:
        raise InputError(f"No split {split!r} of the counting set: there are {', '.join(SPLITS)}.")
    sums = torch.tensor(SPLITS[split])
    numbers = sums[torch.randint(len(sums), (n,), generator=generator)]
    return render(numbers, torch.randint(len(FRUIT), (n, 2), generator=generator), generator)


def render(numbers: Tensor, kinds: Tensor, generator: torch.Generator) -> Sums:
    """Draw given sums: ``numbers`` and ``kinds`` are those of ``Sums``, ``[batch 2]``."""
    n = len(numbers)
    # Each side has six cells, of which the first ``number`` in a random order hold a fruit.
    order = torch.rand(n, 2, len(_CELLS), generator=generator).argsort(2)[:, :, :MOST]
    centre = _CELLS[order] + torch.tensor([[0.0, 0.0], [0.57, 0.0]])[:, None]
    centre = centre + uniform((n, 2, MOST, 2), -1, 1, generator) * torch.tensor([0.015, 0.05])
    shown = torch.arange(MOST) < numbers[:, :, None]
    radius, angle = uniform((n, 2, MOST), 0.07, 0.09, generator), uniform((n, 2, MOST), -0.5, 0.5, generator)
    where = [part.flatten() for part in (*centre.unbind(3), radius, angle)]
    of_slot = kinds.repeat_interleave(MOST, 1)
    shape = (n, _SLOTS, SIZE, SIZE)
    covered = coverage(_SHAPE[of_slot].flatten(), *where, size=SIZE).view(shape) * shown.view(n, _SLOTS, 1, 1)
    pattern = coverage(_PATTERN[of_slot].flatten(), *where, size=SIZE, table=PATTERNS).view(shape)
    colours = (_COLOURS[of_slot] + uniform((n, _SLOTS, 2, 3), -0.06, 0.06, generator)).clamp(0, 1)
    plus = coverage(
        torch.full((n,), KINDS.index("cross")), *(torch.full((n,), at) for at in (0.5, 0.5, 0.06, 0.0)), size=SIZE
    )[:, None]
    image = ground(n, SIZE, generator)
    grey = torch.where(image.mean((1, 2, 3)) > 0.5, 0.15, 0.85)[:, None, None].expand(n, 1, 3)
    image = paint(paint(image, covered, colours[:, :, 0]), covered * pattern, colours[:, :, 1])
    image = noisy(paint(image, plus, grey), 0.04, generator)
    return Sums(image, numbers, kinds, torch.cat([covered, plus], 1))
