"""timm's vision transformers for Prisma."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from prisma_core import hookimpl
from prisma_core.plugin.adapter import Adapter
from prisma_core.plugin.case import Case
from prisma_core.plugin.source import Source
from prisma_timm.beit import BeitAdapter
from prisma_timm.convnext import ConvNeXtAdapter
from prisma_timm.encoders import EncoderAdapter
from prisma_timm.eva import EvaAdapter
from prisma_timm.hiera import HieraAdapter
from prisma_timm.naflexvit import NaFlexVitAdapter
from prisma_timm.refused import SandwichRefused
from prisma_timm.relpos import RelPosAdapter
from prisma_timm.sam import SamAdapter
from prisma_timm.source import TimmSource
from prisma_timm.swin import SwinAdapter, SwinV2Adapter, SwinV2CrAdapter
from prisma_timm.vision_transformer import VisionTransformerAdapter


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
def prisma_adapters() -> Sequence[Adapter]:
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
        SandwichRefused(),
    ]
