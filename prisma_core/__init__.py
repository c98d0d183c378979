"""Prisma opens up vision transformers: one hooked, proven model for every library's ViT.

import prisma_core as prisma

model = prisma.load("timm:vit_base_patch16_224")
logits, cache = model.run_with_cache(model.preprocess("cat.jpg"))
cache["pattern", 3], cache["resid_post", -1]
"""

import importlib
from typing import TYPE_CHECKING, Any

from prisma_core.cli.outline import outline, shapes
from prisma_core.contract.hookspecs import hookimpl
from prisma_core.errors import (
    HookError,
    InputError,
    LoadError,
    MissingPart,
    NotApplicable,
    PluginError,
    PrismaError,
    SpecError,
    UnknownName,
    UnsupportedArchitecture,
    WeightMapError,
)
from prisma_core.hooks.cache import ActivationCache
from prisma_core.hooks.model import HookedModel
from prisma_core.hooks.point import HookContext, HookPoint
from prisma_core.model import Size, ZooModel, assign, tensors_of
from prisma_core.saving.folder import save
from prisma_core.spec import ModelSpec
from prisma_core.spec.layout import TokenLayout
from prisma_core.toolbox.result import Result
from prisma_core.transformer import HookedDual, HookedText, HookedViT
from prisma_core.transformer.block import attentions, mlps
from prisma_core.transformer.embed import resize_positions
from prisma_core.transformer.rewrites import (
    center_writing_weights,
    fold_layer_norm,
    fold_layer_scale,
    fold_value_biases,
    refactor_factored_attn_matrices,
    rewrite,
)
from prisma_core.transformer.rope import count_tables
from prisma_core.upstream.model import HookedUpstream
from prisma_core.zoo import adapt, export, load

if TYPE_CHECKING:
    from collections.abc import Callable

    check: Callable[..., Any]


def __getattr__(name: str) -> Any:
    if name == "check":  # the conformance kit is a plugin, imported when it is used
        return importlib.import_module("prisma_conformance").check
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# fmt: off
__all__ = [
    # models: load, prove, look
    "load", "adapt", "export", "save", "check", "outline", "shapes",
    "HookedViT", "HookedText", "HookedDual", "HookedUpstream", "HookedModel", "ZooModel",
    "ActivationCache", "ModelSpec", "TokenLayout", "Result", "HookPoint", "HookContext", "hookimpl",
    # errors
    "PrismaError", "UnknownName", "HookError", "UnsupportedArchitecture", "WeightMapError", "NotApplicable",
    "MissingPart", "LoadError", "InputError", "SpecError", "PluginError",
    # weights: equivalent ones, and tools for techniques
    "rewrite", "fold_layer_norm", "fold_layer_scale", "center_writing_weights", "fold_value_biases",
    "refactor_factored_attn_matrices", "tensors_of", "assign", "resize_positions", "count_tables", "Size",
    "attentions", "mlps",
]
