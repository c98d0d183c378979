"""Toy vision transformers for Prisma: three that come trained, and ``prisma train`` for your own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prisma_core import hookimpl
from prisma_core.sources import Source
from prisma_toy.scenes import SampleScene, sample_scene
from prisma_toy.source import ToySource

if TYPE_CHECKING:
    import typer


@hookimpl
def prisma_sources() -> Sequence[Source]:
    return [ToySource()]


@hookimpl
def prisma_commands(app: typer.Typer) -> None:
    from prisma_toy.commands import add

    add(app)


__all__ = ["SampleScene", "ToySource", "sample_scene"]
