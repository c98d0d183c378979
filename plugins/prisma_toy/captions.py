"""Captioned scenes: one or two shapes, said in words ("a red circle left of a blue star").

Six of the thirty-six things are never drawn in training, in image or words, though each of their colours and shapes
is: what a model makes of a red heart shows whether it composes what it has learned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prisma_core.plugin import BriefRepr, Count, Share, UnknownName, checked, suggest
from prisma_toy.canvas import ground, noisy, paint, uniform
from prisma_toy.shapes import KINDS, coverage
from prisma_toy.words import Words

SIZE = 64
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.14, 0.18), "green": (0.20, 0.68, 0.26), "blue": (0.18, 0.36, 0.92),
    "yellow": (0.98, 0.86, 0.16), "purple": (0.60, 0.24, 0.80), "orange": (0.98, 0.52, 0.08),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
RELATIONS = ("left of", "right of", "above", "below")
THINGS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
UNSEEN = ("red heart", "green cross", "blue circle", "yellow square", "purple triangle", "orange star")
WORDS = Words(("a", "an", "photo", "of", "left", "right", "above", "below", *COLOURS, *SHAPES), length=14)

_SEEN_THINGS = torch.tensor([index for index, thing in enumerate(THINGS) if thing not in UNSEEN])
_UNSEEN_THINGS = torch.tensor([THINGS.index(thing) for thing in UNSEEN])
_KIND = torch.tensor([KINDS.index(shape) for _ in COLOURS for shape in SHAPES])
_COLOUR = torch.tensor([colour for colour in COLOURS.values() for _ in SHAPES])
_AXIS = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # of each relation: x, y
_SIGN = torch.tensor([-1.0, 1.0, -1.0, 1.0])


@dataclass(frozen=True, repr=False)
class Captioned(BriefRepr):
    """A batch of scenes with what they show.

    Attributes:
        image: pixels in 0..1: ``[batch 3 64 64]``.
        things: indices in ``THINGS`` of the first and the second shape, -1 for none: ``[batch 2]``.
        relation: index in ``RELATIONS`` of the first to the second, -1 where there is one: ``[batch]``.
        captions: a sentence each.
        visible: how much of each pixel the first and the second shape cover: ``[batch 2 64 64]``.
    """

    image: Tensor
    things: Tensor
    relation: Tensor
    captions: tuple[str, ...]
    visible: Tensor

    @checked
    def patch_things(self, patch: Count, least: Share = 0.5) -> Tensor:
        """Return 1 where a thing covers at least ``least`` of a patch: ``[batch patch thing]``.

        Args:
            patch: side of a patch in pixels.
            least: the share to cover.
        """
        share = F.avg_pool2d(self.visible, patch).flatten(2)
        of = F.one_hot(self.things.clamp_min(0), len(THINGS)).float()
        return torch.einsum("bsp,bst->bpt", (share >= least).float(), of)

    @property
    def fits(self) -> Tensor:
        """1 where a caption says the same as an image's own: ``[batch batch]``."""
        ids: dict[tuple[int, ...], int] = {}
        rows = zip(self.things.tolist(), self.relation.tolist(), strict=True)
        keys = [ids.setdefault(_key(*things, relation), len(ids)) for things, relation in rows]
        key = torch.tensor(keys)
        return (key[:, None] == key).float()


def caption(first: str, relation: str | None = None, second: str | None = None) -> str:
    """Return a sentence on one shape, or on how two stand to one another.

    >>> caption("red circle", "left of", "orange star")
    'a red circle left of an orange star'

    Raises:
        UnknownName: there is no such thing or relation.
    """
    for name, names in ((first, THINGS), (second, THINGS), (relation, RELATIONS)):
        if name is not None and name not in names:
            raise UnknownName(f"No {name!r} in these scenes.{suggest(name, names)} There are {', '.join(names)}.")
    return _named(first) if second is None else f"{_named(first)} {relation} {_named(second)}"


def _named(thing: str) -> str:
    return f"{'an' if re.match('[aeiou]', thing) else 'a'} {thing}"


def _key(first: int, second: int, relation: int) -> tuple[int, ...]:
    """Return what a scene shows, the same for both ways to say it."""
    return (second, first, relation - 1) if relation in (1, 3) else (first, second, relation)


def draw(
    n: int,
    generator: torch.Generator,
    *,
    unseen: bool = False,
    alike: bool = False,
    shapes: Sequence[int] = (1, 2),
    photo: float = 0.3,
) -> Captioned:
    """Draw scenes of the things that training shows, or of ``UNSEEN`` ones.

    Scenes with two shapes come in fours that show the same two in all four relations, so that no colour and no shape
    tells one from the other.

    Args:
        unseen: the first shape is one of ``UNSEEN``; two of them are never together.
        alike: lone shapes come in fours of one colour, so that the shape alone tells one from the other.
        shapes: how many a scene may show.
        photo: the share of captions that begin with "a photo of".
    """
    groups = -(-n // 4)
    first = _of(_UNSEEN_THINGS if unseen else _SEEN_THINGS, (groups,), generator)
    second = _of(_SEEN_THINGS, (groups,), generator)
    second = torch.where(second == first, _SEEN_THINGS[(first[:, None] == _SEEN_THINGS).int().argmax(1) - 1], second)
    pair = torch.tensor(shapes)[torch.randint(len(shapes), (groups,), generator=generator)] == 2
    pair, first, second = (each.repeat_interleave(4)[:n] for each in (pair, first, second))
    lone = _alike(groups, generator)[:n] if alike else _of(_UNSEEN_THINGS if unseen else _SEEN_THINGS, (n,), generator)
    things = torch.stack([torch.where(pair, first, lone), torch.where(pair, second, -1)], 1)
    relation = torch.where(pair, torch.arange(n) % 4, -1)
    image, visible = render(things, relation, generator)
    swapped = torch.rand(n, generator=generator) < 0.5
    starts = torch.rand(n, generator=generator) < photo
    rows = zip(things.tolist(), relation.tolist(), swapped.tolist(), starts.tolist(), strict=True)
    return Captioned(image, things, relation, tuple(_said(*row) for row in rows), visible)


def _of(things: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return things[torch.randint(len(things), shape, generator=generator)]


def _alike(groups: int, generator: torch.Generator) -> Tensor:
    """Return groups of four things of one colour, each of another shape, all of them shown in training."""
    seen = torch.zeros(len(THINGS)).index_fill(0, _SEEN_THINGS, 1).view(len(COLOURS), len(SHAPES))
    colour = torch.randint(len(COLOURS), (groups,), generator=generator)
    shape = torch.multinomial(seen[colour], 4, generator=generator)
    return (colour[:, None] * len(SHAPES) + shape).flatten()


def _said(things: list[int], relation: int, swapped: bool, photo: bool) -> str:
    start = "a photo of " if photo else ""
    if relation < 0:
        return start + caption(THINGS[things[0]])
    one, two = (THINGS[thing] for thing in things)
    return start + (caption(two, RELATIONS[relation ^ 1], one) if swapped else caption(one, RELATIONS[relation], two))


def render(things: Tensor, relation: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return scenes of things in a relation, and where they are: ``[batch 3 64 64]``, ``[batch 2 64 64]``.

    Args:
        things: indices in ``THINGS``, -1 for none: ``[batch 2]``.
        relation: indices in ``RELATIONS``, -1 where there is one: ``[batch]``.
    """
    n, shown = len(things), things >= 0
    two = shown.all(1)
    radius = torch.where(two[:, None], uniform((n, 2), 0.15, 0.2, generator), uniform((n, 2), 0.16, 0.3, generator))
    at_will = 0.3 + 0.4 * torch.rand(n, 2, generator=generator)
    # Of two: the middle between them, how far they are apart, and how far aside of the axis.
    middle, apart = uniform((n, 2), 0.44, 0.56, generator), uniform((n, 1), 0.42, 0.5, generator)
    aside = uniform((n, 1), -0.14, 0.14, generator)
    axis, sign = _AXIS[relation], _SIGN[relation][:, None]
    step = (apart * sign * axis + aside * axis.flip(1)) / 2
    first = torch.where(two[:, None], middle + step, at_will)
    x, y = torch.stack([first, middle - step], 1).unbind(2)
    angle = uniform((n, 2), -0.3, 0.3, generator)
    where = [part.flatten() for part in (x, y, radius, angle)]
    covered = coverage(_KIND[things.clamp_min(0)].flatten(), *where, size=SIZE).view(n, 2, SIZE, SIZE)
    covered = covered * shown[:, :, None, None]
    colour = _COLOUR[things.clamp_min(0)] * uniform((n, 2, 1), 0.85, 1.1, generator)
    colour = (colour + uniform((n, 2, 3), -0.05, 0.05, generator)).clamp(0, 1)
    image = noisy(paint(ground(n, SIZE, generator), covered, colour), 0.04, generator)
    visible = torch.stack([covered[:, 0] * (1 - covered[:, 1]), covered[:, 1]], 1)
    return image, visible
