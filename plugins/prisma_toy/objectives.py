"""Objectives of training: the model that a task makes, its loss, and the measure of an example.

The loop of training knows these three and nothing else of a task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from prisma_core import HookedDual, HookedViT, InputError
from prisma_core.plugin import DualSpec, PoolSpec
from prisma_toy.masking import hide, to_patches
from prisma_toy.measure import patch_logits
from prisma_toy.model import dual_model, normalise, pooling, text_spec, vision_model, vision_spec
from prisma_toy.task import Batch, Objective, Task

if TYPE_CHECKING:
    from prisma_toy.config import Config
    from prisma_toy.words import Words


class Classify(Objective):
    """Say the class: cross-entropy of the label, and of what each patch shows, where the task knows it."""

    measure = "accuracy"

    def model(self, task: Task, config: Config) -> HookedViT:
        return vision_model(task, vision_spec(task, config, pooling(config), len(task.labels)), config.seed)

    def loss(self, model: HookedViT, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
        if not config.patch_loss or batch.patches is None:
            logits = model(normalise(batch.image)).float()
            return F.cross_entropy(logits, batch.target), _right(logits, batch.target)
        votes = patch_logits(model, normalise(batch.image)).float()
        logits = _pooled(votes, config)
        patches = votes[:, model.layout.n_prefix :].flatten(0, 1)
        loss = F.cross_entropy(logits, batch.target)
        loss = loss + config.patch_loss * F.cross_entropy(patches, batch.patches.flatten(0, 1))
        return loss, _right(logits, batch.target)

    def score(self, model: HookedViT, batch: Batch) -> Tensor:
        return _right(model(normalise(batch.image)), batch.target)


@dataclass(frozen=True)
class Match(Objective):
    """Tell the caption of each image from the others in the batch, and the image of each caption.

    Captions that say the same of an image fit it equally, as ``target`` says. Patches are asked as well, where the
    batch knows: which of the texts names what they show.

    Attributes:
        words: the tokenizer.
        names: the texts that patches are matched with, in the order of ``Batch.patches``.

    Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision".
    """

    measure = "share of images matched with their caption among those of a batch of 64"
    words: Words
    names: tuple[str, ...] = ()

    def model(self, task: Task, config: Config) -> HookedDual:
        vision = vision_spec(task, config, pooling(config), config.d_model)
        spec = DualSpec(vision=vision, text=text_spec(self.words, config, config.d_model))
        return dual_model(task, spec, self.words, config.seed)

    def loss(self, model: HookedDual, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
        votes = patch_logits(model.vision, normalise(batch.image))
        logits = model.compare(_pooled(votes, config), model.text(batch.tokens)).float()
        to_text, to_image = (fits / fits.sum(1, keepdim=True) for fits in (batch.target, batch.target.T))
        loss = (F.cross_entropy(logits, to_text) + F.cross_entropy(logits.T, to_image)) / 2
        if config.patch_loss and batch.patches is not None:
            shown = batch.patches.any(-1)
            patches = votes[:, model.vision.layout.n_prefix :][shown]
            fits = model.compare(patches, model.text(self.words(self.names))).float()
            loss = loss + config.patch_loss * F.cross_entropy(fits, batch.patches[shown])
        return loss, _fitting(logits, batch.target)

    def score(self, model: HookedDual, batch: Batch) -> Tensor:
        return _fitting(model(normalise(batch.image), batch.tokens), batch.target)


class Reconstruct(Objective):
    """Fill in hidden patches: the mean squared error of their pixels, in -1..1.

    Hidden patches are grey when they come in, and the head reads every patch's own token.

    Source: Xie et al. 2022, "SimMIM: a simple framework for masked image modeling", with patches hidden in the image.
    """

    measure = "share of hidden values within 0.1 of the truth"

    def model(self, task: Task, config: Config) -> HookedViT:
        if config.pool != "avg":
            raise InputError(f"{task.name} reads each patch for itself, so --pool {config.pool} has no use: omit it.")
        n_out = task.channels * task.patch**2
        return vision_model(task, vision_spec(task, config, PoolSpec(kind="patches"), n_out), config.seed)

    def loss(self, model: HookedViT, batch: Batch, config: Config) -> tuple[Tensor, Tensor]:
        made, truth = self._filled(model, batch)
        return F.mse_loss(made, truth), _close(made, truth, batch)

    def score(self, model: HookedViT, batch: Batch) -> Tensor:
        return _close(*self._filled(model, batch), batch)

    def _filled(self, model: HookedViT, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what was made of the hidden patches, and what is there: ``[hidden pixel]``, in -1..1."""
        assert batch.hidden is not None
        patch = model.spec.embed.patch[0]
        made = model(normalise(hide(batch.image, batch.hidden, patch))).float()
        return made[batch.hidden], to_patches(normalise(batch.image), patch)[batch.hidden]


def _pooled(votes: Tensor, config: Config) -> Tensor:
    """Return what the model returns, of every token's: the head is linear, so it may come before the mean."""
    return votes.mean(1) if config.pool == "avg" else votes[:, 0]


def _right(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.argmax(1) == target.argmax(1)).float()


def _fitting(logits: Tensor, fits: Tensor) -> Tensor:
    return fits.gather(1, logits.argmax(1, keepdim=True))[:, 0]


def _close(made: Tensor, truth: Tensor, batch: Batch) -> Tensor:
    """Return how many of an image's hidden values are within 0.1, in 0..1, of the truth."""
    assert batch.hidden is not None
    within = ((made.detach() - truth).abs() <= 0.2).float().mean(1)
    counts = batch.hidden.sum(1)
    owner = torch.arange(len(batch.image)).repeat_interleave(counts)
    return torch.zeros(len(batch.image)).index_add_(0, owner, within) / counts
