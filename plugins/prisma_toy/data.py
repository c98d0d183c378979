"""The toy data by number and seed: what the package exports of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prisma_core.plugin import BriefRepr, Count, InputError, Seed, Share, checked
from prisma_toy import captions, counting, digits, dsprites, motions, scenes
from prisma_toy.scenes import SampleScene


@dataclass(frozen=True, repr=False)
class Sprites(BriefRepr):
    """A batch of sprites.

    Attributes:
        image: ones on zeros: ``[batch 1 64 64]``.
        factors: shape, scale, orientation, x and y, as indices (see ``dsprites.FACTORS``): ``[batch 5]``.
    """

    image: Tensor
    factors: Tensor


def _chances(n: Count, seed: int) -> torch.Generator:
    if n < 1:
        raise InputError(f"Expected at least one image to draw, got n={n}.")
    return torch.Generator().manual_seed(seed)


@checked
def draw_scenes(n: Count, seed: Seed = 0, *, size: Count = 96, two: Share = 0.0) -> scenes.Scenes:
    """Draw scenes of coloured shapes with their classes, ``scenes.LABELS``.

    Args:
        n: how many.
        seed: of everything drawn.
        size: pixels of a side.
        two: the share of scenes that show two shapes of different classes.

    Raises:
        InputError: none are asked for.

    >>> scenes = draw_scenes(8, seed=1)
    >>> scenes.image.shape, scenes.target.shape, scenes.patch_classes(12).shape
    (torch.Size([8, 3, 96, 96]), torch.Size([8, 12]), torch.Size([8, 12, 12]))
    """
    return scenes.draw(n, size, _chances(n, seed), two=two)


@checked
def patch_classes(scene: scenes.Scenes | SampleScene | counting.Sums, rows: Count) -> Tensor:
    """Return what covers most of each patch of a grid: ``[batch row column]``, of one sample scene ``[row column]``.

    Args:
        scene: scenes, one sample scene, or sums; classes are indices in ``scenes.LABELS``, of sums in
            ``counting.PATCH_LABELS``.
        rows: of patches; as many columns.
    """
    return scene.patch_classes(rows)


@checked
def draw_captions(n: Count, seed: Seed = 0, *, unseen: bool = False) -> captions.Captioned:
    """Draw scenes of one or two shapes with a caption each.

    Args:
        n: how many.
        seed: of everything drawn.
        unseen: the first shape is a combination that training never shows (``captions.UNSEEN``).

    Raises:
        InputError: none are asked for.

    >>> draw_captions(2, seed=3).captions
    ('a photo of a green star right of a yellow triangle', 'a photo of a green star left of a yellow triangle')
    """
    return captions.draw(n, _chances(n, seed), unseen=unseen)


@checked
def draw_motions(n: Count, seed: Seed = 0) -> motions.Motions:
    """Draw videos of a moving shape: ``[batch frame 1 32 32]``, with its direction and its way.

    >>> draw_motions(2, seed=1).video.shape
    torch.Size([2, 8, 1, 32, 32])

    Raises:
        InputError: none are asked for.
    """
    return motions.draw(n, _chances(n, seed))


@checked
def draw_sums(n: Count, seed: Seed = 0, *, split: counting.Split = "all") -> counting.Sums:
    """Draw images of the counting set ("2 apples and 2 apples: how many?").

    Args:
        n: how many.
        seed: of everything drawn.
        split: ``train``: twelve of the sixteen sums. ``held-out``: the other four. ``all``.

    Raises:
        InputError: none are asked for, or there is no such split.

    >>> sums = draw_sums(2, seed=0)
    >>> sums.questions[0], sums.total[0].item()
    ('4 lemons and 1 apple: how many?', 5)
    """
    return counting.draw(n, _chances(n, seed), split)


@checked
def draw_sprites(n: Count, seed: Seed = 0) -> Sprites:
    """Draw sprites after the factors of the dSprites data set.

    Raises:
        InputError: none are asked for.
    """
    factors = dsprites.sample(n, _chances(n, seed))
    return Sprites(dsprites.draw(factors), factors)


@checked
def draw_digits(n: Count, seed: Seed = 0, *, training: bool = False) -> tuple[Tensor, Tensor]:
    """Draw handwritten digits from those that scikit-learn ships: images ``[batch 1 8 8]``, digits ``[batch]``.

    Args:
        n: how many.
        seed: of the choice.
        training: of the images that training uses, turned and moved a little; else of the held-out ones, as they are.

    Raises:
        InputError: none are asked for.
        PluginError: scikit-learn is not installed.
    """
    return digits.draw(n, _chances(n, seed), training)
