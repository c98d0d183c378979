"""transformers' video models that are not brought in: which part is in the way, and what to use instead."""

from __future__ import annotations

from prisma_core.adapter import Adapter, Reader
from prisma_core.errors import UnsupportedArchitecture
from prisma_core.hookmap import HookMap
from prisma_core.spec import ModelSpec
from prisma_core.weights import WeightMap

PRETRAINING = "transformers.models.videomae.modeling_videomae.VideoMAEForPreTraining"


class RefusedAdapter(Adapter):
    """VideoMAE's decoder over masked patches."""

    types = (PRETRAINING,)

    def spec(self, upstream: Reader) -> ModelSpec:
        raise _reason(upstream)

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        raise _reason(upstream)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        raise _reason(upstream)


def _reason(upstream: Reader) -> UnsupportedArchitecture:
    return upstream.decoder.unsupported(
        "a decoder that fills in masked patches; adapt(model.videomae) takes the encoder"
    )
