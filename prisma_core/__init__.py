"""Prisma opens up vision transformers: one hooked, proven model for every library's ViT.

import prisma_core as prisma

model = prisma.load("timm:vit_base_patch16_224")
logits, cache = model.run_with_cache(model.preprocess("cat.jpg"))
cache["pattern", 3], cache["resid_post", -1]
"""

import importlib
from typing import TYPE_CHECKING, Any

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
from prisma_core.hooks.cache import ActivationCache
from prisma_core.hooks.model import HookedModel
from prisma_core.hooks.point import HookContext, HookPoint
from prisma_core.hooks.tokens import TokenLayout
from prisma_core.plugin.hookspecs import hookimpl
from prisma_core.result import Result
from prisma_core.saving.folder import save
from prisma_core.spec import ModelSpec
from prisma_core.transformer import HookedViT
from prisma_core.zoo import adapt, export, load

if TYPE_CHECKING:
    from collections.abc import Callable

    check: Callable[..., Any]


def __getattr__(name: str) -> Any:
    if name == "check":  # the conformance kit is a plugin, imported when it is used
        return importlib.import_module("prisma_conformance").check
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "load",
    "adapt",
    "export",
    "save",
    "check",
    "HookedViT",
    "HookedModel",
    "ActivationCache",
    "ModelSpec",
    "TokenLayout",
    "Result",
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
