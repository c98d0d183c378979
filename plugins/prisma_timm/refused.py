"""timm's plain transformers that the canonical one cannot represent: the unsupported module, and the feature."""

from __future__ import annotations

from prisma_core.plugin import Refusal

SANDWICH = "sandwich norms, before and after attention and MLP"
GEMMA4 = (
    Refusal(("timm.models.gemma4_vit.Gemma4VitClassifier",), SANDWICH, "encoder.blocks.0"),
    Refusal(("timm.models.gemma4_vit.Gemma4VitEncoder",), SANDWICH, "blocks.0"),
)
