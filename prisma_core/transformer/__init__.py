"""The canonical transformers, from small parts."""

from prisma_core.model import ZooModel
from prisma_core.transformer.build import build
from prisma_core.transformer.dual import HookedDual
from prisma_core.transformer.text import HookedText
from prisma_core.transformer.vit import HookedViT

__all__ = ["ZooModel", "HookedDual", "HookedText", "HookedViT", "build"]
