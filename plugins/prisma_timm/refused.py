"""timm's plain transformers that the canonical one cannot represent: which module is in the way, and why."""

from __future__ import annotations

from prisma_core.errors import UnsupportedArchitecture
from prisma_core.maps.reader import Reader
from prisma_core.plugin.adapter import Refusal


class SandwichRefused(Refusal):
    """Norms around everything (Gemma 4)."""

    types = ("timm.models.gemma4_vit.Gemma4VitClassifier", "timm.models.gemma4_vit.Gemma4VitEncoder")

    def reason(self, upstream: Reader) -> UnsupportedArchitecture:
        encoder = upstream.encoder if upstream.has("encoder") else upstream
        return next(iter(encoder.blocks)).unsupported("sandwich norms, before and after attention and MLP")
