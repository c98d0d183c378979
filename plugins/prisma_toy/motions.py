"""Motions: short videos of one shape that moves in one of eight directions.

Where the middle of a shape's way lies has nothing to do with its direction, so no single image tells much of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prisma_core.plugin import BriefRepr
from prisma_toy.canvas import ground, noisy, uniform
from prisma_toy.shapes import KINDS, coverage

SIZE, FRAMES = 32, 8
DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
LABELS = tuple(f"{arrow} {name}" for arrow, name in zip("➡↘⬇↙⬅↖⬆↗", DIRECTIONS, strict=True))


@dataclass(frozen=True, repr=False)
class Motions(BriefRepr):
    """A batch of videos.

    Attributes:
        video: pixels in 0..1: ``[batch frame 1 32 32]``.
        direction: index in ``DIRECTIONS``: ``[batch]``.
        centre: x and y of the shape in each frame, where the canvas is 0..1 with y running down: ``[batch frame 2]``.
        visible: how much of each pixel the shape covers: ``[batch frame 32 32]``.
    """

    video: Tensor
    direction: Tensor
    centre: Tensor
    visible: Tensor


def draw(n: int, generator: torch.Generator) -> Motions:
    """Draw videos: of every shape, light on dark or dark on light, 0.03 to 0.07 of the canvas a frame."""
    direction = torch.randint(len(DIRECTIONS), (n,), generator=generator)
    speed, radius = uniform((n,), 0.03, 0.07, generator), uniform((n,), 0.13, 0.2, generator)
    angle = direction * (2 * math.pi / len(DIRECTIONS))
    velocity = torch.stack([angle.cos(), angle.sin()], 1) * speed[:, None]
    # The middle of the way keeps the same distance from every border, whatever the direction. A square's corner lies
    # 1.13 radii from its middle.
    most = (0.5 - 1.15 * radius - speed * (FRAMES - 1) / 2).clamp_min(0)[:, None]
    middle = 0.5 + uniform((n, 2), -1, 1, generator) * most
    frame = torch.arange(FRAMES) - (FRAMES - 1) / 2
    centre = middle[:, None] + frame[:, None] * velocity[:, None]
    kind = torch.randint(len(KINDS), (n,), generator=generator)
    turn = uniform((n,), -math.pi, math.pi, generator)
    still = [each.repeat_interleave(FRAMES) for each in (radius, turn)]
    covered = coverage(kind.repeat_interleave(FRAMES), *centre.flatten(0, 1).unbind(1), *still, size=SIZE)
    covered = covered.view(n, FRAMES, 1, SIZE, SIZE)
    behind = ground(n, SIZE, generator).mean(1, keepdim=True)[:, None]
    light = behind.mean((1, 2, 3, 4), keepdim=True)
    contrast = uniform((n, 1, 1, 1, 1), 0.35, 0.6, generator)
    shade = torch.where(light > 0.5, light - contrast, light + contrast)
    video = noisy(behind * (1 - covered) + shade * covered, 0.08, generator)
    return Motions(video, direction, centre, covered[:, :, 0])
