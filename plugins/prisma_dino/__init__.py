"""DINO, DINOv2 and DINOv3 for Prisma: transformers' classes, Meta's own files, and their heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from prisma_core import hookimpl
from prisma_core.plugin import Adapter, Case, Source
from prisma_dino.canonical.dinov2 import Dinov2Adapter
from prisma_dino.canonical.dinov3 import Dinov3Adapter
from prisma_dino.canonical.meta_adapter import MetaAdapter
from prisma_dino.heads import DinoHead, last_layers, linear_input, load_head, load_linear_head
from prisma_dino.source import DinoSource

__all__ = ["DinoHead", "last_layers", "linear_input", "load_head", "load_linear_head"]


@hookimpl
def prisma_sources() -> Sequence[Source]:
    return [DinoSource()]


@hookimpl
def prisma_adapters() -> Sequence[Adapter]:
    return [Dinov2Adapter(), Dinov3Adapter(), MetaAdapter()]


@hookimpl
def prisma_cases() -> Sequence[Case]:
    from prisma_dino.meta_cases import meta_cases

    if importlib.util.find_spec("transformers") is None:
        return list(meta_cases())
    from prisma_dino.cases import cases

    return [*cases(), *meta_cases()]
