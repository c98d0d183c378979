"""timm's plain transformers that the canonical one cannot represent: which module is in the way, and why."""

from __future__ import annotations

from prisma_core.adapter import Adapter, Reader
from prisma_core.errors import UnsupportedArchitecture
from prisma_core.hookmap import HookMap
from prisma_core.spec import ModelSpec
from prisma_core.weights import WeightMap

SAM = "timm.models.vision_transformer_sam.VisionTransformerSAM"
GEMMA4 = ("timm.models.gemma4_vit.Gemma4VitClassifier", "timm.models.gemma4_vit.Gemma4VitEncoder")


class RefusedAdapter(Adapter):
    """Windows with a bias that depends on the queries (SAM), and norms around everything (Gemma 4)."""

    types = (SAM, *GEMMA4)

    def spec(self, upstream: Reader) -> ModelSpec:
        raise _reason(upstream)

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        raise _reason(upstream)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        raise _reason(upstream)


def _reason(upstream: Reader) -> UnsupportedArchitecture:
    if upstream.is_a(SAM):
        for block in upstream.blocks:
            if block.window_size:
                return block.unsupported(f"attention in windows of {block.window_size} patches")
            if block.attn.use_rel_pos:
                return block.attn.unsupported("a bias that depends on the queries")
        return upstream.neck.unsupported("convolutions behind the blocks")
    encoder = upstream.encoder if upstream.has("encoder") else upstream
    return next(iter(encoder.blocks)).unsupported("sandwich norms, before and after attention and MLP")
