"""One model's weights under the names that several libraries give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from prisma_conformance.measure import worst
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core.transformer import ZooModel

MISSING = "it is not installed: pip install prisma-interp[all]"
timm = pytest.importorskip("timm", reason=MISSING)
transformers = pytest.importorskip("transformers", reason=MISSING)
open_clip = pytest.importorskip("open_clip", reason=MISSING)
FLOAT64 = 1e-10
WIDTH, HEADS, DEPTH, PATCH, SIDE, D_MLP, REGISTERS, EPS = 24, 3, 2, 4, 3, 48, 2, 1e-4
State = Mapping[str, Tensor]
Sizes = tuple[int, ...]


def draw(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors in float64 for every parameter of a module."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, x in module.named_parameters():
        scale = 0.5 if x.ndim < 2 or x.shape[0] == 1 else (x.numel() / x.shape[0]) ** -0.5
        drawn[name] = torch.randn(x.shape, generator=generator, dtype=torch.float64) * scale
    return drawn


def renamed(state: State, *pairs: tuple[str, str]) -> dict[str, Tensor]:
    """Return a state dict with each pattern replaced in its names, one after the other."""
    names = {name: name for name in state}
    for pattern, to in pairs:
        names = {old: re.sub(pattern, to, new) for old, new in names.items()}
    return {new: state[old] for old, new in names.items()}


def split(state: State, pattern: str, *targets: str) -> dict[str, Tensor]:
    """Return a state dict in which tensors are cut into equal parts, each with a name of its own."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if re.search(pattern, name):
            parts = tensor.chunk(len(targets))
            found |= {re.sub(pattern, to, name): x for to, x in zip(targets, parts, strict=True)}
        else:
            found[name] = tensor
    return found


def without(state: State, *patterns: str) -> dict[str, Tensor]:
    return {name: x for name, x in state.items() if not any(re.search(pattern, name) for pattern in patterns)}


def hooked(module: nn.Module, state: State) -> ZooModel:
    """Return the hooked form of a library's module with these weights, every one of them used."""
    module = module.double().eval()
    module.load_state_dict(dict(state), strict=True)
    return prisma.adapt(module)


def agree(models: Mapping[str, ZooModel], *inputs: Tensor, differ: Mapping[str, str] | None = None) -> int:
    """Compare every activation of every model with the first one's, name by name; return how many were compared.

    Args:
        differ: patterns of names that may be missing on a side or hold other numbers, each with the reason.
    """
    caches = {name: model.run_with_cache(*inputs)[1] for name, model in models.items()}
    (first, reference), *others = caches.items()
    excused = [re.compile(pattern) for pattern in differ or {}]
    compared = 0
    for name, cache in others:
        apart = {hook for hook in set(cache) ^ set(reference) if not any(one.search(hook) for one in excused)}
        assert not apart, f"only one of {first} and {name} has {sorted(apart)}"
        for hook in set(cache) & set(reference):
            if any(one.search(hook) for one in excused):
                continue
            error = worst(cache[hook], reference[hook])
            assert error < FLOAT64, f"{hook}: {name} differs from {first} by {error:.1e}"
            compared += 1
    return compared


def image() -> Tensor:
    return torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH, dtype=torch.float64)


LAYER_NORM = partial(nn.LayerNorm, eps=EPS)
SMALL: dict[str, Any] = {
    "img_size": SIDE * PATCH,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": D_MLP / WIDTH,
    "norm_layer": LAYER_NORM,
    "num_classes": 0,
}
CONFIG: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
    "layer_norm_eps": EPS,
}
META: dict[str, Any] = {
    "width": WIDTH,
    "depth": DEPTH,
    "heads": HEADS,
    "patch": (PATCH, PATCH),
    "grid": (SIDE, SIDE),
    "d_mlp": D_MLP,
    "eps": EPS,
}
SECOND: dict[str, Any] = {**META, "layer_scale": True, "mask_token": True}
# How transformers names what Meta's blocks hold.
BLOCKS = (
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"),
)
QKV = (r"\.attn\.qkv\.", ".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj.")
