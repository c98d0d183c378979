"""CLIP models for Prisma: open_clip's, transformers' and TinyCLIP's."""

from __future__ import annotations

from collections.abc import Sequence

from prisma_clip.towers import DualAdapter, TextAdapter, TimmAdapter, VisionAdapter
from prisma_core import hookimpl
from prisma_core.adapter import Adapter


@hookimpl
def prisma_adapters() -> Sequence[Adapter]:
    return [DualAdapter(), VisionAdapter(), TimmAdapter(), TextAdapter()]
