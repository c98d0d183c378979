"""timm's plain transformers that the canonical one cannot represent: which module is in the way, and why."""

from __future__ import annotations

from prisma_core.adapter import Adapter, Reader
from prisma_core.errors import UnsupportedArchitecture
from prisma_core.hookmap import HookMap
from prisma_core.spec import ModelSpec
from prisma_core.weights import WeightMap

GEMMA4 = ("timm.models.gemma4_vit.Gemma4VitClassifier", "timm.models.gemma4_vit.Gemma4VitEncoder")


class RefusedAdapter(Adapter):
    """Norms around everything (Gemma 4)."""

    types = GEMMA4

    def spec(self, upstream: Reader) -> ModelSpec:
        raise _reason(upstream)

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        raise _reason(upstream)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        raise _reason(upstream)


def _reason(upstream: Reader) -> UnsupportedArchitecture:
    encoder = upstream.encoder if upstream.has("encoder") else upstream
    return next(iter(encoder.blocks)).unsupported("sandwich norms, before and after attention and MLP")
