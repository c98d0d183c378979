"""Further figures for the cards of trained toys: a function a task, a line a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prisma_core import HookedDual, HookedViT
from prisma_toy import captions, motions
from prisma_toy import counting as sums
from prisma_toy import scenes as scene_data
from prisma_toy.masking import draw_hidden, hide, to_patches
from prisma_toy.measure import Score, two_shape_lens
from prisma_toy.model import normalise

if TYPE_CHECKING:
    from prisma_toy.config import Config

N, SEED = 1024, 7777


def _score(right: Tensor) -> Score:
    return Score(int(right.sum()), right.numel())


def scenes(model: HookedViT, config: Config) -> list[str]:
    """Return what the patches were trained for, and how well the lens of the last layer shows it."""
    if not config.patch_loss:
        return []
    shapes, ground = two_shape_lens(model, 256)
    return [
        "Loss: cross-entropy of the image's label, plus that of each patch for what it shows, "
        f"weighted {config.patch_loss:g}. So the last layer's logit lens is trained to place the shapes, that of "
        "earlier layers is not.",
        "Scenes in training: three in ten show two shapes, whose label is shared by visible area. Held-out "
        "scenes show shapes of one class, or none.",
        f"Last layer's lens on 256 fresh scenes with two shapes: own class on {shapes} patches of shapes, "
        f"empty on {ground} patches of ground (patches that one class covers at least 60 % of).",
    ]


@torch.no_grad()
def named(model: HookedDual, n: int, *, unseen: bool, seed: int = SEED) -> Score:
    """Score a dual encoder at naming lone shapes, zero-shot, among all thirty-six things."""
    drawn = captions.draw(n, torch.Generator().manual_seed(seed), unseen=unseen, shapes=(1,))
    names = [captions.caption(thing) for thing in captions.THINGS]
    right = model(normalise(drawn.image), captions.WORDS(names)).argmax(1) == drawn.things[:, 0]
    return _score(right)


@torch.no_grad()
def related(model: HookedDual, n: int, *, unseen: bool, seed: int = SEED) -> Score:
    """Score a dual encoder at telling how two shapes stand to one another, among the four captions of these two."""
    drawn = captions.draw(n, torch.Generator().manual_seed(seed), unseen=unseen, shapes=(2,))
    right: list[Tensor] = []
    for image, (one, two), relation in zip(drawn.image, drawn.things.tolist(), drawn.relation, strict=True):
        texts = [captions.caption(captions.THINGS[one], each, captions.THINGS[two]) for each in captions.RELATIONS]
        right.append(model(normalise(image[None]), captions.WORDS(texts)).argmax() == relation)
    return _score(torch.stack(right))


@torch.no_grad()
def _matched(model: HookedDual, n: int, *, unseen: bool) -> Score:
    generator, right = torch.Generator().manual_seed(SEED), 0.0
    for _ in range(n // 64):
        drawn = captions.draw(64, generator, unseen=unseen)
        logits = model(normalise(drawn.image), captions.WORDS(drawn.captions))
        right += float(drawn.fits.gather(1, logits.argmax(1, keepdim=True)).sum())
    return Score(right, n)


def captioned(model: HookedDual, config: Config) -> list[str]:
    """Return how a dual encoder does on lone shapes, on relations, and on things it has never been shown."""
    return [
        f"Held-out images named zero-shot, one shape, among all {len(captions.THINGS)} things: "
        f"{named(model, N, unseen=False)}.",
        f"The same for the combinations never shown in training ({', '.join(captions.UNSEEN)}): "
        f"{named(model, N, unseen=True)}.",
        "How two shapes stand to one another, among the four captions of these two: "
        f"{related(model, N, unseen=False)}; with one of the unseen combinations {related(model, N, unseen=True)}.",
        f"Matched with their caption in batches of 64 where each scene has an unseen combination: "
        f"{_matched(model, N, unseen=True)}.",
        "In training a batch of scenes with two shapes holds each pair in all four relations, and lone shapes come in "
        "fours of one colour; held-out scenes are drawn without.",
        *_patches(config),
    ]


def _patches(config: Config) -> list[str]:
    if not config.patch_loss:
        return []
    return [
        "Loss: that of images and captions matched both ways, plus that of each patch that a thing covers half of, "
        f"matched with the names of the things, weighted {config.patch_loss:g}. So what patches show at the last layer "
        "is trained, along the names."
    ]


@torch.no_grad()
def motion(model: HookedViT, config: Config) -> list[str]:
    """Return what becomes of the answer when a video runs backwards, and when its frames are in random order."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = motions.draw(N, generator)
    back = model(normalise(drawn.video.flip(1))).argmax(1)
    opposite = (drawn.direction + len(motions.DIRECTIONS) // 2) % len(motions.DIRECTIONS)
    order = torch.rand(N, motions.FRAMES, generator=generator).argsort(1)
    mixed = drawn.video[torch.arange(N)[:, None], order]
    shuffled = model(normalise(mixed)).argmax(1)
    return [
        f"Videos: {motions.FRAMES} frames in patches of 2 frames x 8 x 8 pixels; 8 directions.",
        f"Run backwards, the opposite direction is said for {_score(back == opposite)}; with frames in random order, "
        f"the right one for {_score(shuffled == drawn.direction)}.",
    ]


@torch.no_grad()
def counting(model: HookedViT, config: Config) -> list[str]:
    """Return how well the sums that were trained on are told on fresh images, and each held-out sum."""
    drawn = sums.draw(N, torch.Generator().manual_seed(SEED), "all")
    totals = model(normalise(drawn.image)).argmax(1) + sums.TOTALS[0]
    right = totals == drawn.total
    is_held_out = torch.tensor([tuple(row) in sums.HELD_OUT_SUMS for row in drawn.numbers.tolist()])
    each = [
        f"{a} + {b} {_score(right[(drawn.numbers == torch.tensor([a, b])).all(1)]).accuracy:.1%}"
        for a, b in sums.HELD_OUT_SUMS
    ]
    return [
        f"Fresh images of the {len(sums.TRAINING_SUMS)} sums that are trained on: {_score(right[~is_held_out])}.",
        f"Held-out sums one by one, on {int(is_held_out.sum())} fresh images: {', '.join(each)}.",
    ]


@torch.no_grad()
def masked(model: HookedViT, config: Config) -> list[str]:
    """Return a masked autoencoder's error beside that of the best single colour for all an image's hidden pixels."""
    generator, patch = torch.Generator().manual_seed(SEED), model.spec.embed.patch[0]
    image = scene_data.draw(N, model.spec.image_size[0], generator).image
    hidden = draw_hidden(N, model.layout.n_patches, 0.6, generator)
    truth = to_patches(normalise(image), patch)
    patches = model(normalise(hide(image, hidden, patch)))
    error = ((patches - truth)[hidden] ** 2).mean()
    visible = truth.unflatten(2, (3, -1)) * ~hidden[:, :, None, None]
    colour = visible.sum((1, 3)) / ((~hidden).sum(1) * patch**2)[:, None]
    plain = colour[:, None, :, None].expand(-1, truth.shape[1], -1, patch**2).flatten(2)
    alone = ((plain - truth)[hidden] ** 2).mean()
    return [
        "Loss: mean squared error of the hidden patches' values in -1..1. Hidden patches are grey when they come in; "
        "the head makes each patch's pixels of its own token.",
        f"On {N} fresh scenes: {error:.4f}, where the mean colour of what is visible has {alone:.4f}.",
    ]
