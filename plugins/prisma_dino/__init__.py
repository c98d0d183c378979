"""DINO, DINOv2 and DINOv3 for Prisma: transformers' classes, Meta's own files, and their heads."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from prisma_core import hookimpl
from prisma_core.adapter import Adapter
from prisma_core.conformance.case import Case
from prisma_dino.dinov2 import Dinov2Adapter
from prisma_dino.dinov3 import Dinov3Adapter


@hookimpl
def prisma_adapters() -> Sequence[Adapter]:
    return [Dinov2Adapter(), Dinov3Adapter()]


@hookimpl
def prisma_cases() -> Sequence[Case]:
    if importlib.util.find_spec("transformers") is None:
        return []
    from prisma_dino.cases import cases

    return list(cases())
