"""The canonical transformers, from small parts."""

from torch import nn

from prisma_core.model import ZooModel
from prisma_core.spec import AnySpec, DualSpec, ModelSpec
from prisma_core.transformer.dual import HookedDual
from prisma_core.transformer.text import HookedText
from prisma_core.transformer.vit import HookedViT

__all__ = ["ZooModel", "HookedDual", "HookedText", "HookedViT", "build"]


def build(spec: AnySpec, stem: nn.Module | None = None) -> ZooModel:
    """Return the model of a spec, its weights not yet loaded; ``stem`` is upstream's own, of opaque ones."""
    if isinstance(spec, ModelSpec):
        return HookedViT(spec, stem)
    if isinstance(spec, DualSpec):
        return HookedDual(spec, stem)
    return HookedText(spec)
