"""timm's vision transformers for Prisma."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from prisma_core import hookimpl
from prisma_core.plugin import Adapter, Case, Refusal, Source
from prisma_timm.canonical.beit import BeitAdapter
from prisma_timm.canonical.encoders import EncoderAdapter
from prisma_timm.canonical.eva import EvaAdapter
from prisma_timm.canonical.naflexvit import NaFlexVitAdapter
from prisma_timm.canonical.relpos import RelPosAdapter
from prisma_timm.canonical.vision_transformer import VisionTransformerAdapter
from prisma_timm.hooked.convnext import ConvNeXtAdapter
from prisma_timm.hooked.hiera import HieraAdapter
from prisma_timm.hooked.sam import SamAdapter
from prisma_timm.hooked.swin import SwinAdapter, SwinV2Adapter, SwinV2CrAdapter
from prisma_timm.refused import GEMMA4
from prisma_timm.source import TimmSource


@hookimpl
def prisma_sources() -> Sequence[Source]:
    return [TimmSource()]


@hookimpl
def prisma_cases() -> Sequence[Case]:
    if importlib.util.find_spec("timm") is None:
        return []
    from prisma_timm.cases import cases

    return list(cases(prisma_adapters()))


@hookimpl
def prisma_adapters() -> Sequence[Adapter | Refusal]:
    return [
        VisionTransformerAdapter(),
        EvaAdapter(),
        BeitAdapter(),
        RelPosAdapter(),
        NaFlexVitAdapter(),
        EncoderAdapter(),
        SwinAdapter(),
        SwinV2Adapter(),
        SwinV2CrAdapter(),
        HieraAdapter(),
        ConvNeXtAdapter(),
        SamAdapter(),
        *GEMMA4,
    ]
