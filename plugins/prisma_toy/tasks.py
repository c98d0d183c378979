"""The tasks a toy model can be trained on: data, objective, and the names of classes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prisma_core.plugin import UnknownName, suggest
from prisma_toy import captions, counting, digits, dsprites, motions, puzzles, reports, scenes
from prisma_toy.masking import draw_hidden
from prisma_toy.objectives import Classify, Match, Reconstruct
from prisma_toy.task import Batch, Task


def _one_hot(index: Tensor, n: int) -> Tensor:
    return torch.nn.functional.one_hot(index, n).float()


def _scenes() -> Task:
    size, patch = 96, 8

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        drawn = scenes.draw(n, size, generator, two=0.3 if training else 0.0)
        return Batch(drawn.image, drawn.target, drawn.share(size // patch).flatten(2).transpose(1, 2))

    about = "the coloured shape in a scene"
    return Task("scenes", about, scenes.LABELS, 3, size, patch, draw, Classify(), report=reports.scenes)


def _mae_scenes() -> Task:
    size, patch, share = 48, 6, 0.6

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        image = scenes.draw(n, size, generator).image
        return Batch(image, torch.empty(0), hidden=draw_hidden(n, (size // patch) ** 2, share, generator))

    about = f"the pixels of hidden patches, {share:.0%} of a scene's"
    return Task("mae-scenes", about, (), 3, size, patch, draw, Reconstruct(), report=reports.masked)


def _clip_scenes() -> Task:
    patch = 8
    seen = [at for at, thing in enumerate(captions.THINGS) if thing not in captions.UNSEEN]
    names = tuple(captions.caption(captions.THINGS[at]) for at in seen)

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        drawn = captions.draw(n, generator, alike=training)
        tokens = captions.WORDS(drawn.captions)
        return Batch(drawn.image, drawn.fits, drawn.patch_things(patch)[..., seen], tokens)

    about = "the caption of a scene of one or two shapes"
    match = Match(captions.WORDS, names)
    return Task("clip-scenes", about, (), 3, captions.SIZE, patch, draw, match, report=reports.captioned)


def _motion() -> Task:
    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        drawn = motions.draw(n, generator)
        return Batch(drawn.video, _one_hot(drawn.direction, len(motions.LABELS)))

    about = "which way a shape moves"
    fresh = "on videos drawn from chances that no training run uses"
    one = Task("motion", about, motions.LABELS, 1, motions.SIZE, 8, draw, Classify(), report=reports.motion)
    return replace(one, tubelet=2, frames=motions.FRAMES, held_out_is=fresh)


def _counting() -> Task:
    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        drawn = counting.draw(n, generator, "train" if training else "held-out")
        return Batch(drawn.image, _one_hot(drawn.total - counting.TOTALS[0], len(counting.TOTALS)))

    sums = ", ".join(f"{left} + {right}" for left, right in counting.HELD_OUT_SUMS)
    about, fresh = (
        "how many fruit there are in a sum",
        f"on fresh images of the sums that are never trained on ({sums})",
    )
    one = Task("counting", about, counting.LABELS, 3, counting.SIZE, 6, draw, Classify(), report=reports.counting)
    return replace(one, held_out_is=fresh)


def _dsprites(factor: str) -> Task:
    column, count = list(dsprites.FACTORS).index(factor), dsprites.FACTORS[factor]

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        factors = dsprites.sample(n, generator)
        return Batch(dsprites.draw(factors), _one_hot(factors[:, column], count))

    name, about = f"dsprites-{factor}", f"the {factor} of a sprite"
    return Task(name, about, dsprites.labels(factor), 1, dsprites.SIZE, 8, draw, Classify())


def _circle(what: str) -> Task:
    grid = puzzles.CIRCLE_GRID
    cells = tuple(f"row {row} column {column}" for row in range(grid) for column in range(grid))
    names = cells if what == "position" else tuple(f"size {size}" for size in range(puzzles.CIRCLE_SIZES))

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        image, cell, size = puzzles.circles(n, generator)
        return Batch(image, _one_hot(cell if what == "position" else size, len(names)))

    return Task(f"circle-{what}", f"the {what} of a circle", names, 1, puzzles.CIRCLE_SIZE, 4, draw, Classify())


def _induction() -> Task:
    names = tuple(f"{emoji} {glyph}" for emoji, glyph in zip(puzzles.EMOJI, puzzles.GLYPHS, strict=True))

    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        image, target, _ = puzzles.induction(n, generator)
        return Batch(image, _one_hot(target, len(names)))

    about = "the glyph after the last one's earlier copy"
    return Task("induction", about, names, 1, puzzles.INDUCTION_SIZE, puzzles.CELL, draw, Classify())


def _digits() -> Task:
    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        image, digit = digits.draw(n, generator, training)
        return Batch(image, _one_hot(digit, 10))

    def held_out() -> Batch:
        image, digit = digits.split(training=False)
        return Batch(image, _one_hot(digit, 10))

    about = "a handwritten digit (scikit-learn's set)"
    origin = (
        f"{digits.N_IMAGES - digits.HELD_OUT:,} of the {digits.N_IMAGES:,} real images that scikit-learn ships, "
        "turned, moved and scaled a little in training"
    )
    one = Task("digits", about, digits.LABELS, 1, digits.SIZE, 2, draw, Classify(), held_out=held_out)
    return replace(one, origin=origin, held_out_is="the images that no run trains on")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _scenes(),
        _clip_scenes(),
        _mae_scenes(),
        _motion(),
        _counting(),
        _digits(),
        *(_dsprites(factor) for factor in dsprites.FACTORS),
        _circle("position"),
        _circle("size"),
        _induction(),
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
