"""transformers' video models that are not brought in: which part is in the way, and what to use instead."""

from __future__ import annotations

from prisma_core.errors import UnsupportedArchitecture
from prisma_core.maps.reader import Reader
from prisma_core.plugin.adapter import Refusal


class DecoderRefused(Refusal):
    """VideoMAE's decoder over masked patches."""

    types = ("transformers.models.videomae.modeling_videomae.VideoMAEForPreTraining",)

    def reason(self, upstream: Reader) -> UnsupportedArchitecture:
        return upstream.decoder.unsupported(
            "a decoder that fills in masked patches; adapt(model.videomae) takes the encoder"
        )
