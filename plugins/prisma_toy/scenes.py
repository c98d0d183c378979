"""Scenes: coloured shapes and small beasts on plain or textured ground, drawn afresh for every batch.

Every scene has one label. Most show one shape of one of eleven classes, some several copies of it, some none, and some
(for training only) two shapes that share the label by their visible areas. Some classes share a colour, and only a
pattern tells them apart, so that a patch of plain red has to look around.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from prisma_core.plugin import BriefRepr, Count, Seed, checked
from prisma_toy.canvas import ground, uniform
from prisma_toy.shapes import KINDS, PATTERNS, coverage

EMPTY = "⬜ empty"
_RED, _BLUE, _GREEN = (0.86, 0.16, 0.20), (0.20, 0.42, 0.90), (0.22, 0.68, 0.28)
_YELLOW, _PURPLE, _ORANGE, _BLACK = (0.98, 0.82, 0.20), (0.62, 0.30, 0.80), (0.97, 0.55, 0.12), (0.10, 0.08, 0.08)


@dataclass(frozen=True)
class Thing:
    """One class of shapes: what it is called, and how it is drawn."""

    label: str
    shape: str
    colour: tuple[float, float, float]
    pattern: str = "plain"
    second: tuple[float, float, float] = _BLACK


THINGS: tuple[Thing, ...] = (
    Thing("🔴 red circle", "circle", _RED),
    Thing("🐞 ladybird", "circle", _RED, "dots", _BLACK),
    Thing("🍉 watermelon", "circle", _RED, "rim", _GREEN),
    Thing("⭐ yellow star", "star", _YELLOW),
    Thing("🐝 bee", "ellipse", _YELLOW, "stripes", _BLACK),
    Thing("🔶 orange diamond", "diamond", _ORANGE),
    Thing("🐯 tiger", "circle", _ORANGE, "stripes", _BLACK),
    Thing("🟦 blue square", "square", _BLUE),
    Thing("🌍 globe", "circle", _BLUE, "continents", _GREEN),
    Thing("💚 green heart", "heart", _GREEN),
    Thing("🟣 purple circle", "circle", _PURPLE),
)
LABELS: tuple[str, ...] = (EMPTY, *(thing.label for thing in THINGS))

_KIND_OF_CLASS = torch.tensor([0] + [KINDS.index(thing.shape) for thing in THINGS])
_PATTERN_OF_CLASS = torch.tensor([0] + [list(PATTERNS).index(thing.pattern) for thing in THINGS])
_COLOURS_OF_CLASS = torch.tensor([(_BLACK, _BLACK)] + [(thing.colour, thing.second) for thing in THINGS])
_SLOTS = 4
_CLUTTER = 5


@dataclass(frozen=True, repr=False)
class Scenes(BriefRepr):
    """A batch of scenes.

    Attributes:
        image: pixels in 0..1: ``[batch 3 height width]``.
        classes: of the shape in each slot, 0 where there is none: ``[batch slot]``.
        visible: how much of each pixel each slot's shape covers, what lies behind others left out:
            ``[batch slot height width]``.
    """

    image: Tensor
    classes: Tensor
    visible: Tensor

    @property
    def target(self) -> Tensor:
        """The label as a distribution: shapes by visible area, or empty: ``[batch class]``."""
        area = self.share(1)[:, :, 0, 0][:, 1:]
        total = area.sum(1, keepdim=True)
        empty = (total < 1e-6).float()
        return torch.cat([empty, area / total.clamp_min(1e-6) * (1 - empty)], dim=1)

    @checked
    def patch_classes(self, rows: Count) -> Tensor:
        """Return the class that covers most of each patch of a grid: ``[batch row column]``."""
        return self.share(rows).argmax(1)

    @checked
    def share(self, rows: Count) -> Tensor:
        """Return how much of each cell of a grid shows each class: ``[batch class row column]``."""
        covered = F.adaptive_avg_pool2d(self.visible, (rows, rows))
        n, slots = self.classes.shape
        index = self.classes[:, :, None, None].expand(n, slots, rows, rows)
        share = torch.zeros(n, len(LABELS), rows, rows).scatter_add_(1, index, covered)
        share[:, 0] = 1 - covered.sum(1)
        return share


def draw(n: int, size: int, generator: torch.Generator, *, two: float = 0.0) -> Scenes:
    """Draw scenes.

    Args:
        n: how many.
        size: pixels of a side.
        generator: the only source of chance.
        two: the share of scenes with two shapes of different classes.
    """
    classes = torch.zeros(n, _SLOTS, dtype=torch.long)
    main = torch.randint(1, len(LABELS), (n,), generator=generator)
    other = 1 + (main - 1 + torch.randint(1, len(THINGS), (n,), generator=generator)) % len(THINGS)
    what = torch.rand(n, generator=generator)
    empty = what < 0.1 * (1 - two)
    several = (what >= 0.1 * (1 - two)) & (what < 0.3 * (1 - two))
    pair = what >= 1 - two
    copies = torch.randint(2, _SLOTS + 1, (n,), generator=generator)
    classes[:, 0] = main.where(~empty, 0)
    for slot in range(1, _SLOTS):
        classes[:, slot] = main.where(several & (slot < copies), 0)
    classes[:, 1] = other.where(pair, classes[:, 1])
    return draw_classes(classes, size, generator)


def draw_classes(classes: Tensor, size: int, generator: torch.Generator) -> Scenes:
    """Draw scenes of given classes: ``[batch slot]``, 0 for no shape; shapes keep apart where there is room."""
    n, slots = classes.shape
    shown = (classes > 0).sum(1)
    radius = uniform((n, slots), 0.17, 0.32, generator) * (1 - 0.11 * (shown - 1).clamp(0, 3).float())[:, None]
    x, y = _places(radius, classes > 0, generator)
    angle = uniform((n, slots), -0.4, 0.4, generator)
    where = [part.flatten() for part in (x, y, radius, angle)]
    shapes = coverage(_KIND_OF_CLASS[classes].flatten(), *where, size=size)
    patterns = coverage(_PATTERN_OF_CLASS[classes].flatten(), *where, size=size, table=PATTERNS)
    patterns = patterns.view(n, slots, 1, size, size)
    shapes = shapes.view(n, slots, size, size) * (classes > 0)[:, :, None, None]
    colours = _COLOURS_OF_CLASS[classes] * uniform((n, slots, 1, 1), 0.85, 1.1, generator)
    colours = (colours + uniform((n, slots, 2, 3), -0.06, 0.06, generator)).clamp(0, 1)[..., None, None]
    paint = colours[:, :, 0] + (colours[:, :, 1] - colours[:, :, 0]) * patterns

    image = _clutter(ground(n, size, generator), size, generator)
    visible = torch.zeros(n, slots, size, size)
    for slot in range(slots):
        alpha = shapes[:, slot, None]
        shade = 1 + uniform((n, 1, 1, 1), -0.25, 0.25, generator) * torch.linspace(-1, 1, size)[None, None, :, None]
        image = image * (1 - alpha) + (paint[:, slot] * shade).clamp(0, 1) * alpha
        visible[:, :slot] *= 1 - alpha
        visible[:, slot] = alpha[:, 0]
    noise = torch.randn(n, 3, size, size, generator=generator) * uniform((n, 1, 1, 1), 0.0, 0.05, generator)
    return Scenes((image + noise).clamp(0, 1), classes, visible)


def _places(radius: Tensor, present: Tensor, generator: torch.Generator, tries: int = 24) -> tuple[Tensor, Tensor]:
    """Return centres ``[batch slot]``: of some random arrangements, the one whose shapes overlap least."""
    n, slots = radius.shape
    margin = radius[..., None] * 0.9
    spots = torch.rand(n, slots, tries, generator=generator), torch.rand(n, slots, tries, generator=generator)
    x, y = (margin + (1 - 2 * margin) * spot for spot in spots)
    apart = torch.hypot(x[:, :, None] - x[:, None], y[:, :, None] - y[:, None])
    overlap = (radius[:, :, None] + radius[:, None])[..., None] - apart
    both = (present[:, :, None] & present[:, None]) & ~torch.eye(slots, dtype=torch.bool)
    best = (overlap.clamp_min(0) * both[..., None]).sum((1, 2)).argmin(-1)
    chosen = best[:, None, None].expand(-1, slots, 1)
    return x.gather(2, chosen)[..., 0], y.gather(2, chosen)[..., 0]


def _clutter(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Strew small grey shapes over images, which are no class of their own."""
    n = len(image)
    kind = torch.randint(len(KINDS), (n, _CLUTTER), generator=generator)
    radius = uniform((n, _CLUTTER), 0.015, 0.05, generator)
    x, y, angle = (uniform((n, _CLUTTER), 0, top, generator) for top in (1.0, 1.0, torch.pi))
    grey = uniform((n, _CLUTTER, 1), 0, 1, generator) + uniform((n, _CLUTTER, 3), -0.05, 0.05, generator)
    shown = torch.arange(_CLUTTER) < torch.randint(0, _CLUTTER + 1, (n, 1), generator=generator)
    alpha = coverage(*(part.flatten() for part in (kind, x, y, radius, angle)), size=size)
    alpha = alpha.view(n, _CLUTTER, size, size) * shown[:, :, None, None] * 0.85
    for index in range(_CLUTTER):
        layer = alpha[:, index, None]
        image = image * (1 - layer) + grey[:, index, :, None, None].clamp(0, 1) * layer
    return image


@dataclass(frozen=True)
class SampleScene:
    """A scene to look at, with the truth about it.

    Attributes:
        image: of ``size`` pixels a side, a Pillow image.
        labels: of the shapes in it.
        classes: their indices in ``LABELS``.
        scenes: the image as a batch of one.
    """

    image: Image.Image
    labels: tuple[str, ...]
    classes: tuple[int, ...]
    scenes: Scenes

    @checked
    def patch_classes(self, rows: Count) -> Tensor:
        """Return the class that covers most of each patch of a grid: ``[row column]``."""
        return self.scenes.share(rows)[0].argmax(0)


@checked
def sample_scene(seed: Seed = 0, n_shapes: Count = 2, size: Count = 384) -> SampleScene:
    """Return a scene of ``n_shapes`` (at most 4) shapes of different classes, larger than the model's input.

    >>> sample_scene(seed=0).image.size
    (384, 384)
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(THINGS), generator=generator)[:n_shapes] + 1
    classes = torch.zeros(1, _SLOTS, dtype=torch.long)
    classes[0, :n_shapes] = order
    scenes = draw_classes(classes, size, generator)
    pixels = (scenes.image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    picked = tuple(order.tolist())
    return SampleScene(Image.fromarray(pixels), tuple(LABELS[i] for i in picked), picked, scenes)
