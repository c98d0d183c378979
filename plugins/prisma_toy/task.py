"""A task: its data, its objective, and the names of classes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prisma_core import ZooModel
from prisma_core.plugin import BriefRepr
from prisma_toy.config import Config


@dataclass(frozen=True, repr=False)
class Batch(BriefRepr):
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


class Objective(ABC):
    """The model, the loss and the measure of a task.

    Attributes:
        measure: what ``score`` counts, in words that follow "held-out".
    """

    measure: ClassVar[str]

    @abstractmethod
    def model(self, task: Task, config: Config) -> ZooModel:
        """Return the model to train, with the weights that training starts from."""

    @abstractmethod
    def loss(self, model: Any, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and the measure of each example: ``[]``, ``[batch]`` in 0..1."""

    @abstractmethod
    def score(self, model: Any, batch: Batch) -> Tensor:
        """Return the measure of each example: ``[batch]`` in 0..1."""


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
    objective: Objective
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
