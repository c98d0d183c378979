"""Videos for Prisma: transformers' video models, and videos read from files."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from prisma_core import hookimpl
from prisma_core.plugin import Adapter, Case, Refusal, VideoPreprocess, read_video
from prisma_vivit.canonical.videomae import VideoMAEAdapter
from prisma_vivit.canonical.vivit import VivitAdapter
from prisma_vivit.canonical.vjepa2 import VJEPA2Adapter
from prisma_vivit.hooked.timesformer import TimesformerAdapter
from prisma_vivit.hooked.vjepa2_maps import Predictor, VJEPA2ClassifierAdapter, VJEPA2PredictorAdapter
from prisma_vivit.processing import preprocess_of
from prisma_vivit.refused import DECODER


@hookimpl
def prisma_cases() -> Sequence[Case]:
    if importlib.util.find_spec("transformers") is None:
        return []
    from prisma_vivit.cases import cases

    return list(cases())


@hookimpl
def prisma_adapters() -> Sequence[Adapter | Refusal]:
    return [
        VivitAdapter(),
        VideoMAEAdapter(),
        VJEPA2Adapter(),
        VJEPA2PredictorAdapter(),
        VJEPA2ClassifierAdapter(),
        TimesformerAdapter(),
        DECODER,
    ]


__all__ = ["Predictor", "VideoPreprocess", "preprocess_of", "prisma_adapters", "prisma_cases", "read_video"]
