"""The image encoders of transformers for Prisma."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from prisma_core import hookimpl
from prisma_core.plugin import Adapter, Case, Refusal, Source
from prisma_hf.canonical.encoder import EncoderAdapter
from prisma_hf.mae import AutoencoderAdapter
from prisma_hf.refused import refusals
from prisma_hf.source import HfSource


@hookimpl
def prisma_sources() -> Sequence[Source]:
    return [HfSource()]


@hookimpl
def prisma_adapters() -> Sequence[Adapter | Refusal]:
    return [EncoderAdapter(), AutoencoderAdapter(), *refusals()]


@hookimpl
def prisma_cases() -> Sequence[Case]:
    if importlib.util.find_spec("transformers") is None:
        return []
    from prisma_hf.cases import cases

    return list(cases())
