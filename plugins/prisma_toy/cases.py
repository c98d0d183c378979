"""Conformance cases: published toys of every kind, small."""

from __future__ import annotations

from functools import partial

import torch

from prisma_core.plugin import Case
from prisma_toy.options import Options
from prisma_toy.published import PublishedViT

WIDTH, HEADS, D_HEAD, D_MLP, SIDE, PATCH, CHANNELS, CLASSES = 12, 3, 5, 20, 3, 4, 2, 7


def cases() -> list[Case]:
    """Return a case for each way the published toys differ."""
    kinds = {
        "attention-only": (shapes(mlp=False), Options()),
        "attention-and-mlp": (shapes(), Options(act="relu")),
        "norms": (shapes(norms=True), Options(act="gelu_tanh", pool="avg")),
        "no-class-token": (shapes(token=False), Options(centred=True)),
    }
    return [Case(f"published-{name}", build=partial(PublishedViT, *given)) for name, given in kinds.items()]


def shapes(*, layers: int = 2, mlp: bool = True, norms: bool = False, token: bool = True) -> dict[str, torch.Size]:
    """Return the names and shapes of a file's tensors."""
    sizes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "embed.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "embed.proj.bias": (WIDTH,),
        "pos_embed.W_pos": (SIDE**2 + token, WIDTH),
        "head.W_H": (WIDTH, CLASSES),
        "head.b_H": (CLASSES,),
    }
    placed = ["ln_pre", "ln_final"]
    for layer in range(layers):
        block = f"blocks.{layer}"
        sizes |= {f"{block}.attn.W_{part}": (HEADS, WIDTH, D_HEAD) for part in "QKV"}
        sizes |= {f"{block}.attn.b_{part}": (HEADS, D_HEAD) for part in "QKV"}
        sizes |= {f"{block}.attn.W_O": (HEADS, D_HEAD, WIDTH), f"{block}.attn.b_O": (WIDTH,)}
        placed += [f"{block}.ln1", *([f"{block}.ln2"] if mlp else [])]
        if mlp:
            sizes |= {f"{block}.mlp.W_in": (WIDTH, D_MLP), f"{block}.mlp.b_in": (D_MLP,)}
            sizes |= {f"{block}.mlp.W_out": (D_MLP, WIDTH), f"{block}.mlp.b_out": (WIDTH,)}
    if norms:
        sizes |= {f"{norm}.{part}": (WIDTH,) for norm in placed for part in "wb"}
    return {name: torch.Size(shape) for name, shape in sizes.items()}
