"""Prisma opens up vision transformers: one hooked, proven model for every library's ViT.

import prisma_core as prisma

model = prisma.load("timm:vit_base_patch16_224")
logits, cache = model.run_with_cache(model.preprocess("cat.jpg"))
cache["pattern", 3], cache["resid_post", -1]
"""

from typing import TYPE_CHECKING, Any

from prisma_core.cache import ActivationCache
from prisma_core.errors import (
    HookError,
    InputError,
    LoadError,
    NotApplicable,
    PluginError,
    PrismaError,
    UnknownName,
    UnsupportedArchitecture,
    WeightMapError,
)
from prisma_core.hooked import Hooked
from prisma_core.hooks import HookContext, HookPoint
from prisma_core.hookspecs import hookimpl
from prisma_core.layout import TokenLayout
from prisma_core.saved import save
from prisma_core.spec import ModelSpec
from prisma_core.transformer import HookedViT
from prisma_core.zoo import adapt, export, load

if TYPE_CHECKING:
    from prisma_core.conformance import check


def __getattr__(name: str) -> Any:
    if name == "check":  # the kit is large, and most who import the core never ask for it
        from prisma_core.conformance import check

        return check
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "load",
    "adapt",
    "export",
    "save",
    "check",
    "HookedViT",
    "Hooked",
    "ActivationCache",
    "ModelSpec",
    "TokenLayout",
    "HookPoint",
    "HookContext",
    "hookimpl",
    "PrismaError",
    "UnknownName",
    "HookError",
    "UnsupportedArchitecture",
    "WeightMapError",
    "NotApplicable",
    "LoadError",
    "InputError",
    "PluginError",
]
