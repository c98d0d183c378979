"""The adapters of timm's models, and the refusals."""

from __future__ import annotations

from prisma_core.plugin import Adapter, Refusal
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


def adapters() -> list[Adapter | Refusal]:
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
