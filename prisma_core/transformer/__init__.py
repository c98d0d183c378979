"""The canonical vision transformer, from parts."""

from prisma_core.transformer.vit import HookedViT

__all__ = ["HookedViT"]
