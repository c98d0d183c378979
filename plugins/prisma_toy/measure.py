"""Accuracy of a toy model on held-out images, and patch by patch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prisma_core import HookedViT, ZooModel
from prisma_toy import scenes
from prisma_toy.model import normalise

if TYPE_CHECKING:
    from prisma_toy.task import Batch, Task


@dataclass(frozen=True)
class Score:
    """So many right of so many; a fraction where an example counts by a share of its own in 0..1."""

    right: float
    n: int

    @property
    def accuracy(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy (Wilson); of shares, whose deviation is smaller, it is too wide."""
        z, p, n = 1.96, self.accuracy, self.n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - half, min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.accuracy:.2f} % of {self.n} (95 % interval {100 * low:.2f} to {100 * high:.2f})"


def patch_logits(model: HookedViT, image: Tensor) -> Tensor:
    """Return the last layer's logit lens, final norm and head on every token: ``[batch pos class]``."""
    x = model(image, stop_at_layer=model.spec.n_layers)
    if model.spec.ln_final is not None:
        x = model.ln_final(x)
    return model.head(x)


def held_out(
    model: ZooModel,
    on: Task,
    n: int,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score a model on freshly drawn images that no training run draws, or on all held-out images where data end.

    Args:
        n: how many to draw.
        batch: how many at a time; where the other captions of a batch are the wrong answers, as many as there are.
        progress: told after each batch how many have been seen.
    """
    if on.held_out is not None:
        whole = on.held_out()
        return scored(model, on, whole)
    right, seen, step = 0.0, 0, 0
    while seen < n:
        score = scored(model, on, on.batch(min(batch, n - seen), "held-out", seed, step))
        right, seen, step = right + score.right, seen + score.n, step + 1
        if progress is not None:
            progress(seen)
    return Score(right, n)


def scored(model: ZooModel, on: Task, batch: Batch) -> Score:
    """Score a model on one batch of a task."""
    with torch.no_grad():
        values = on.objective.score(model, batch)
    return Score(float(values.double().sum()), len(values))


def two_shape_lens(model: HookedViT, n: int, seed: int = 0, sure: float = 0.6) -> tuple[Score, Score]:
    """Score the last layer's logit lens on scenes with two shapes of different classes.

    Args:
        n: scenes.
        sure: patches count which one class covers at least so much of.

    Returns:
        the patches of shapes that show their own class, and the patches of ground that show ``empty``.
    """
    size, patch = model.spec.image_size[0], model.spec.embed.patch[0]
    drawn = scenes.draw(n, size, torch.Generator().manual_seed(seed), two=1.0)
    with torch.no_grad():
        top = patch_logits(model, normalise(drawn.image))[:, model.layout.n_prefix :].argmax(-1)
    share, truth = drawn.share(size // patch).flatten(2).max(1)
    right = top == truth
    shape, ground = ((truth > 0) & (share >= sure), (truth == 0) & (share >= sure))
    return tuple(Score(int(right[where].sum()), int(where.sum())) for where in (shape, ground))  # pyright: ignore
