"""The facts of a model: frozen, checked, and the same after a trip through JSON; and the layout of its tokens."""

from prisma_core.spec.models import AnySpec, DualSpec, MapSpec, ModelSpec, TextPoolSpec, TextSpec
from prisma_core.spec.parts import (
    Activation,
    AttentionSpec,
    BlockSpec,
    EmbedSpec,
    Facts,
    Interpolation,
    MlpSpec,
    NormSpec,
    PoolSpec,
    RopeCount,
    RopeGrid,
    RopeSpec,
)

__all__ = [
    "Activation",
    "AnySpec",
    "AttentionSpec",
    "BlockSpec",
    "DualSpec",
    "EmbedSpec",
    "Facts",
    "Interpolation",
    "MapSpec",
    "MlpSpec",
    "ModelSpec",
    "NormSpec",
    "PoolSpec",
    "RopeCount",
    "RopeGrid",
    "RopeSpec",
    "TextPoolSpec",
    "TextSpec",
]
