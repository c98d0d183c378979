"""Training tasks: each draws its batches and names its classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prisma_core.plugin import UnknownName, suggest
from prisma_toy import digits, dsprites, puzzles, scenes


@dataclass(frozen=True)
class Batch:
    """Pictures with their labels.

    Attributes:
        image: pixels in 0..1: ``[batch channel height width]``.
        target: each label as a distribution over classes: ``[batch class]``.
        patches: what each patch shows, where the task knows: ``[batch patch class]``.
    """

    image: Tensor
    target: Tensor
    patches: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """A data set without an end.

    Attributes:
        name: what ``prisma train --data`` takes.
        summary: what the label means.
        labels: names of the classes, an emoji first where there is a fitting one.
        channels, size, patch: of the pictures.
        draw: ``(n, generator, training) -> Batch``.
        knows_patches: whether batches say what each patch shows.
        held_out: the whole held-out set, where the data end.
    """

    name: str
    summary: str
    labels: tuple[str, ...]
    channels: int
    size: int
    patch: int
    draw: Callable[[int, torch.Generator, bool], Batch]
    knows_patches: bool = False
    held_out: Callable[[], Batch] | None = None

    def batch(self, n: int, split: str, seed: int, step: int) -> Batch:
        """Return batch ``step`` of a split; the same four arguments always draw the same pictures.

        Args:
            n: pictures in the batch.
            split: ``train`` or ``held-out``, whose chances have nothing to do with one another.
        """
        digest = hashlib.blake2b(f"{self.name} {split} {seed} {step}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        return self.draw(n, generator, split == "train")


def _one_hot(index: Tensor, n: int) -> Tensor:
    return torch.nn.functional.one_hot(index, n).float()


def _scenes() -> Task:
    size, patch = 96, 8

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        drawn = scenes.draw(n, size, generator, two=0.3 if training else 0.0)
        return Batch(drawn.image, drawn.target, drawn.share(size // patch).flatten(2).transpose(1, 2))

    return Task("scenes", "the coloured shape in a scene", scenes.LABELS, 3, size, patch, draw, knows_patches=True)


def _dsprites(factor: str) -> Task:
    column, count = list(dsprites.FACTORS).index(factor), dsprites.FACTORS[factor]

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        factors = dsprites.sample(n, generator)
        return Batch(dsprites.draw(factors), _one_hot(factors[:, column], count))

    return Task(f"dsprites-{factor}", f"the {factor} of a sprite", dsprites.labels(factor), 1, dsprites.SIZE, 8, draw)


def _circle(what: str) -> Task:
    grid = puzzles.CIRCLE_GRID
    cells = tuple(f"row {row} column {column}" for row in range(grid) for column in range(grid))
    names = cells if what == "position" else tuple(f"size {size}" for size in range(puzzles.CIRCLE_SIZES))

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        image, cell, size = puzzles.circles(n, generator)
        return Batch(image, _one_hot(cell if what == "position" else size, len(names)))

    return Task(f"circle-{what}", f"the {what} of a circle", names, 1, puzzles.CIRCLE_SIZE, 4, draw)


def _induction() -> Task:
    names = tuple(f"{emoji} {glyph}" for emoji, glyph in zip(puzzles.EMOJI, puzzles.GLYPHS, strict=True))

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        image, target, _ = puzzles.induction(n, generator)
        return Batch(image, _one_hot(target, len(names)))

    return Task(
        "induction", "the glyph after the last one's earlier copy", names, 1, puzzles.INDUCTION_SIZE, puzzles.CELL, draw
    )


def _digits() -> Task:
    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        image, digit = digits.draw(n, generator, training)
        return Batch(image, _one_hot(digit, 10))

    def held_out() -> Batch:
        image, digit = digits.split(training=False)
        return Batch(image, _one_hot(digit, 10))

    about = "a handwritten digit (scikit-learn's set)"
    return Task("digits", about, digits.LABELS, 1, digits.SIZE, 2, draw, held_out=held_out)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _scenes(),
        *(_dsprites(factor) for factor in dsprites.FACTORS),
        _circle("position"),
        _circle("size"),
        _induction(),
        _digits(),
    )
}


def task(name: str) -> Task:
    """Return a task by name; ``dsprites`` is short for ``dsprites-shape``, ``circle`` for ``circle-position``.

    Raises:
        UnknownName: there is none; the nearest are suggested.
    """
    name = {"dsprites": "dsprites-shape", "circle": "circle-position"}.get(name, name)
    if name not in TASKS:
        raise UnknownName(f"No toy data {name!r}. There are {', '.join(TASKS)}.{suggest(name, TASKS)}")
    return TASKS[name]
