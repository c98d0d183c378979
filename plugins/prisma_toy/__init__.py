"""Toy transformers for Prisma: small trained models of every kind, the data they were trained on, and ``prisma train``.

The data are drawn, not stored: every function ``draw_...`` takes how many and a seed, and returns the images, pixels in
0..1, with all that is known of them. ``normalise`` makes of them what a toy model takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prisma_core import hookimpl
from prisma_core.plugin import Adapter, Case, Source
from prisma_toy.adapter import PublishedAdapter
from prisma_toy.captions import Captioned
from prisma_toy.counting import Sums
from prisma_toy.data import (
    Sprites,
    draw_captions,
    draw_digits,
    draw_motions,
    draw_scenes,
    draw_sprites,
    draw_sums,
    patch_classes,
)
from prisma_toy.masking import draw_hidden, hide, reconstruct
from prisma_toy.model import normalise
from prisma_toy.motions import Motions
from prisma_toy.reconstructions import reconstructions
from prisma_toy.scenes import SampleScene, Scenes, sample_scene
from prisma_toy.source import ToySource, series, training_log
from prisma_toy.words import Words

if TYPE_CHECKING:
    import typer


@hookimpl
def prisma_sources() -> Sequence[Source]:
    return [ToySource()]


@hookimpl
def prisma_adapters() -> Sequence[Adapter]:
    return [PublishedAdapter()]


@hookimpl
def prisma_cases() -> Sequence[Case]:
    from prisma_toy.cases import cases

    return cases()


@hookimpl
def prisma_commands(app: typer.Typer) -> None:
    from prisma_toy.commands import add

    add(app)


# fmt: off
__all__ = [
    # data
    "sample_scene", "draw_scenes", "draw_captions", "draw_motions", "draw_sums", "draw_sprites", "draw_digits",
    "patch_classes", "normalise",
    # what they return
    "SampleScene", "Scenes", "Captioned", "Motions", "Sums", "Sprites",
    # models: checkpoints along training, hidden patches, captions as tokens
    "series", "training_log", "draw_hidden", "hide", "reconstruct", "reconstructions", "Words", "ToySource",
]
