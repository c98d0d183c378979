"""Toy vision transformers for Prisma: three that come trained, those the project published, and ``prisma train``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prisma_core import hookimpl
from prisma_core.plugin import Adapter, Case, Source
from prisma_toy.adapter import PublishedAdapter
from prisma_toy.scenes import SampleScene, sample_scene
from prisma_toy.source import ToySource

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


__all__ = ["SampleScene", "ToySource", "sample_scene"]
