"""The tasks a toy model can be trained on: data, objective, and the names of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prisma_core.plugin import UnknownName, suggest
from prisma_toy import captions, counting, digits, dsprites, motions, puzzles, reports, scenes
from prisma_toy.masking import draw_hidden
from prisma_toy.objectives import Classify, Match, Objective, Reconstruct

if TYPE_CHECKING:
    from prisma_toy.config import Config


@dataclass(frozen=True)
class Batch:
    """Images or videos, and what the objective compares with.

    Attributes:
        image: pixels in 0..1: ``[batch channel height width]``, of videos ``[batch frame channel height width]``.
        target: of labels, each as a distribution over classes: ``[batch class]``. Of captions, 1 where one fits an
            image: ``[batch text]``. Empty where the image itself is the target.
        patches: what each patch shows, as a distribution over classes, where the loss asks for it:
            ``[batch patch class]``. Nothing but zeros where a patch is not asked.
        tokens: of captions, one an image: ``[text pos]``.
        hidden: which patches are hidden: bools ``[batch patch]``.
    """

    image: Tensor
    target: Tensor
    patches: Tensor | None = None
    tokens: Tensor | None = None
    hidden: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """Data, and what is asked of a model that sees them: all that ``prisma train`` knows of a task.

    Attributes:
        name: what ``prisma train --data`` takes.
        summary: what is asked for.
        labels: names of the classes, an emoji first where there is a fitting one; none where nothing is classified.
        channels, size, patch: of the images, or of a video's frames.
        draw: ``(n, generator, training) -> Batch``.
        objective: the model, the loss and the measure.
        tubelet: how many frames a patch of a video spans; None for images.
        frames: of a video.
        held_out: the whole held-out set, where the data end.
        report: further figures for the card of a trained model, a line each.
        origin: where the images come from.
        held_out_is: what the held-out figure was measured on.
    """

    name: str
    summary: str
    labels: tuple[str, ...]
    channels: int
    size: int
    patch: int
    draw: Callable[[int, torch.Generator, bool], Batch]
    objective: Objective = field(default_factory=Classify)
    tubelet: int | None = None
    frames: int = 1
    held_out: Callable[[], Batch] | None = None
    report: Callable[[Any, Config], list[str]] | None = None
    origin: str = "drawn by this package for every batch afresh; no data set is downloaded or stored"
    held_out_is: str = "on images drawn from chances that no training run uses"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image ``(channel, height, width)``, or video with its frames before."""
        image = (self.channels, self.size, self.size)
        return image if self.tubelet is None else (self.frames, *image)

    def batch(self, n: int, split: str, seed: int, step: int) -> Batch:
        """Return batch ``step`` of a split; the same four arguments always draw the same images.

        Args:
            n: images in the batch.
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

    about = "the coloured shape in a scene"
    return Task("scenes", about, scenes.LABELS, 3, size, patch, draw, report=reports.scenes)


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
    one = Task("motion", about, motions.LABELS, 1, motions.SIZE, 8, draw, report=reports.motion, held_out_is=fresh)
    return replace(one, tubelet=2, frames=motions.FRAMES)


def _counting() -> Task:
    def draw(n: int, generator: torch.Generator, training: bool) -> Batch:
        drawn = counting.draw(n, generator, "train" if training else "held-out")
        return Batch(drawn.image, _one_hot(drawn.total - counting.TOTALS[0], len(counting.TOTALS)))

    sums = ", ".join(f"{left} + {right}" for left, right in counting.HELD_OUT_SUMS)
    about, report = "how many fruit there are in a sum", reports.counting
    fresh = f"on fresh images of the sums that are never trained on ({sums})"
    return Task("counting", about, counting.LABELS, 3, counting.SIZE, 6, draw, report=report, held_out_is=fresh)


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
    origin = (
        f"{digits.N_IMAGES - digits.HELD_OUT:,} of the {digits.N_IMAGES:,} real images that scikit-learn ships, "
        "turned, moved and scaled a little in training"
    )
    one = Task("digits", about, digits.LABELS, 1, digits.SIZE, 2, draw, held_out=held_out, origin=origin)
    return replace(one, held_out_is="the images that no run trains on")


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
