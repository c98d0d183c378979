"""timm's vision transformers for Prisma."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from prisma_core import hookimpl
from prisma_core.plugin import Adapter, Case, Refusal, Source
from prisma_timm.adapters import adapters
from prisma_timm.source import TimmSource


@hookimpl
def prisma_sources() -> Sequence[Source]:
    return [TimmSource()]


@hookimpl
def prisma_cases() -> Sequence[Case]:
    if importlib.util.find_spec("timm") is None:
        return []
    from prisma_timm.cases import cases

    return list(cases(adapters()))


@hookimpl
def prisma_adapters() -> Sequence[Adapter | Refusal]:
    return adapters()
