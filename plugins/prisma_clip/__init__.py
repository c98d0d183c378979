"""CLIP models for Prisma: open_clip's, transformers' and TinyCLIP's."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from prisma_clip.canonical.hf_bert import OpenClipText
from prisma_clip.canonical.hf_dual import HfDual, Projected
from prisma_clip.canonical.hf_towers import TOWERS as HF_TOWERS
from prisma_clip.canonical.towers import DualAdapter, TextAdapter, TimmAdapter, VisionAdapter
from prisma_clip.source import OpenClipSource
from prisma_core import hookimpl
from prisma_core.plugin import Adapter, Case, Source


@hookimpl
def prisma_sources() -> Sequence[Source]:
    return [OpenClipSource()]


@hookimpl
def prisma_adapters() -> Sequence[Adapter]:
    return [
        DualAdapter(),
        VisionAdapter(),
        TimmAdapter(),
        TextAdapter(),
        OpenClipText(),
        HfDual(),
        Projected(),
        *HF_TOWERS,
    ]


@hookimpl
def prisma_cases() -> Sequence[Case]:
    cases: list[Case] = []
    if importlib.util.find_spec("open_clip") is not None:
        from prisma_clip.cases import lone_towers, whole

        cases += [*whole(), *lone_towers()]
    if importlib.util.find_spec("transformers") is not None:
        from prisma_clip.hf_cases import hf_cases

        cases += hf_cases()
    return cases
