"""transformers' video models that Prisma cannot represent: the unsupported part, and what to load instead."""

from __future__ import annotations

from prisma_core.plugin import Refusal

DECODER = Refusal(
    ("transformers.models.videomae.modeling_videomae.VideoMAEForPreTraining",),
    "a decoder that fills in masked patches; adapt(model.videomae) takes the encoder",
    "decoder",
)
