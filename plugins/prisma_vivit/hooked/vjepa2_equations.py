"""What the hook points of V-JEPA 2's predictor and classifier are to each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from prisma_core.plugin import Reader
from prisma_vivit.hooked.mapping import Acts, Claim, attention_equations, mlp_equations


def layers_equations(at: str, layers: Reader, acts: Acts) -> Iterator[Claim]:
    """Yield what the parts of plain blocks are."""
    for index, layer in enumerate(layers):
        to, own = f"{at}.{index}", layer.module.get_submodule("self_attn" if at.startswith("pool") else "attention")
        names = ("layer_norm1", "layer_norm2") if at.startswith("pool") else ("norm1", "norm2")
        ln1, ln2 = (layer.module.get_submodule(name) for name in names)
        yield f"{to}: ln1 = ln(resid_pre)", acts[f"{to}.ln1.hook_normalized"], ln1(acts[f"{to}.hook_resid_pre"])
        out = own.get_submodule("out_proj" if at.startswith("pool") else "proj")
        scale = own.scale if at.startswith("pool") else own.scaling
        yield from attention_equations(f"{to}.attn", acts, cast(float, scale), out, acts[f"{to}.hook_attn_out"])
        normed = ln2(acts[f"{to}.hook_resid_mid"])
        yield f"{to}: ln2 = ln(resid_mid)", acts[f"{to}.ln2.hook_normalized"], normed
        yield from mlp_equations(to, normed, *_mlp_parts(layer), acts)


def turned_equations(layers: Reader, acts: Acts, *, twice: bool) -> Iterator[Claim]:
    """Yield what turned queries and keys are.

    Args:
        twice: every position is there twice: seen, and to be predicted.
    """
    for index, layer in enumerate(layers):
        at, attn = f"blocks.{index}.attn", cast(Any, layer.attention.module)
        for name in "qk":
            x = acts[f"{at}.hook_{name}"].transpose(1, 2)
            places = torch.arange(x.shape[2] // (1 + twice), device=x.device).repeat_interleave(1 + twice)
            turned = attn.apply_rotary_embeddings(x, attn.get_position_ids(x, masks=places.expand(len(x), -1)))
            yield f"{at}: rot_{name} = {name} turned", acts[f"{at}.hook_rot_{name}"], turned.transpose(1, 2)


def _mlp_parts(layer: Reader) -> tuple[nn.Module, nn.Module, nn.Module]:
    return layer.mlp.fc1.module, layer.mlp.activation.module, layer.mlp.fc2.module


def query_equations(pooler: Reader, acts: Acts) -> Iterator[Claim]:
    """Yield what the query of the attentive pooler reads and becomes."""
    cross = pooler.cross_attention_layer
    tokens = acts[f"pool.blocks.{len(pooler.self_attention_layers) - 1}.hook_resid_post"]
    yield "pool: ln1 = ln(tokens)", acts["pool.ln1.hook_normalized"], cross.layer_norm1.module(tokens)
    query = pooler.query_tokens.expand(len(tokens), -1, -1)
    yield "pool: the query is the same for all", acts["pool.hook_query"], query
    yield "pool: q = query W_Q + b_Q", acts["pool.attn.hook_q"].flatten(-2), cross.cross_attn.q_proj.module(query)
    yield from attention_equations("pool.attn", acts, cross.cross_attn.scale, None, None)
    mid = acts["pool.hook_resid_mid"]
    yield "pool: resid_mid = query + z", mid, query + acts["pool.attn.hook_z"].flatten(-2)
    normed = cross.layer_norm2.module(mid)
    yield "pool: ln2 = ln(resid_mid)", acts["pool.ln2.hook_normalized"], normed
    yield from mlp_equations("pool", normed, *_mlp_parts(cross), acts)
    yield "pool: resid_post = resid_mid + mlp_out", acts["pool.hook_resid_post"], mid + acts["pool.hook_mlp_out"]
    yield "hook_pooled = the query at last", acts["hook_pooled"], acts["pool.hook_resid_post"][:, 0]
