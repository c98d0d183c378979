"""timm.models.beit.Beit: BEiT and BEiT v2."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from prisma_core.plugin import (
    Adapter,
    AttentionSpec,
    BlockSpec,
    HookMap,
    ModelSpec,
    Reader,
    TokenLayout,
    WeightMap,
    linear_rows,
    norm_rows,
    same_for_all,
)
from prisma_timm.canonical import common
from prisma_timm.canonical.blocks import pattern_hooks, stream_hooks

HOOKS = """
    patch_embed                       ->  hook_embed
    pos_drop                          ->  hook_full_embed
    blocks.{l}.attn @ mul : in        ->  blocks.{l}.attn.hook_q  : b h p d -> b p h d
    blocks.{l}.attn @ matmul : in1    ->  blocks.{l}.attn.hook_k  : b h d p -> b p h d
    blocks.{l}.attn @ matmul#1 : in1  ->  blocks.{l}.attn.hook_v  : b h p d -> b p h d
"""


class BeitAdapter(Adapter):
    """Pre-norm blocks with a learned bias for each offset between two tokens, per layer, shared, or both."""

    types = ("timm.models.beit.Beit",)
    ignored: ClassVar[Mapping[str, str]] = {
        **common.IGNORED,
        "Attention.qkv_bias_separate": "when the bias is added changes nothing",
        "Attention.[kv]_bias": "there if q_bias is",
        "Attention.window_size": "the shape of the table of biases",
        "Attention.num_relative_distance": "the shape of the table of biases",
        "Attention.relative_position_index": "there if the table of biases is",
        "RelativePositionBias.window_*": "the shape of the table of biases",
    }

    def spec(self, upstream: Reader) -> ModelSpec:
        rows, columns = common.grid(upstream.patch_embed)
        shared = upstream.has("rel_pos_bias")
        return ModelSpec(
            d_model=upstream.embed_dim,
            image_size=upstream.patch_embed.img_size,
            embed=common.patch_embed(upstream.patch_embed, pos=upstream.has("pos_embed"), dynamic=False),
            layout=TokenLayout(cls=1, rows=rows, columns=columns),
            blocks=tuple(_block(block, shared) for block in upstream.blocks),
            ln_final=common.norm(upstream.norm),
            pool=common.pool(upstream),
            ln_pool=common.norm(upstream.fc_norm),
            d_pool=upstream.embed_dim,
            n_classes=common.classes(upstream.head),
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        shared = upstream.has("rel_pos_bias")
        table = (
            linear_rows("patch_embed.proj", "embed.proj")
            + norm_rows("patch_embed.norm", "embed.norm")
            + """
            cls_token  ->  embed.prefix     :  1 n d -> n d
            pos_embed  ->  embed.pos_embed  :  1 p d -> p d
            """
            + same_for_all(upstream, [_block_rows(block, shared) for block in upstream.blocks])
            + common.end_rows()
        )
        return WeightMap.parse(table, {"bias": attn_bias})

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        at = "blocks.{l}"
        rows = HOOKS + common.END_HOOKS + stream_hooks(at, at) + pattern_hooks(f"{at}.attn", f"{at}.attn", z="proj")
        mlps = [common.mlp_hooks(block.mlp, f"{at}.mlp", f"{at}.mlp") for block in upstream.blocks]
        return HookMap.parse(rows + same_for_all(upstream, mlps), h=spec.blocks[0].attn.n_heads)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)


def attn_bias(*tensors: Tensor) -> Tensor:
    """Return the bias ``[head query_pos key_pos]`` of tables ``[offset head]``, each with its index."""
    tables = zip(tensors[::2], tensors[1::2], strict=True)
    return torch.stack([rearrange(table[index], "q k h -> h q k") for table, index in tables]).sum(0)


def _block(block: Reader, shared: bool) -> BlockSpec:
    attn = block.attn
    if not block.is_a("timm.models.beit.Block") or not attn.is_a("timm.models.beit.Attention"):
        raise block.unsupported("its kind of block")
    scaled = block.has("gamma_1")
    if scaled != block.has("gamma_2"):
        raise block.unsupported("a scale of only one of attention and MLP")
    common.linear(attn.qkv)
    d_head = common.linear(attn.proj).in_features // attn.num_heads
    return BlockSpec(
        attn=AttentionSpec(
            n_heads=attn.num_heads,
            n_kv_heads=attn.num_heads,
            d_head=d_head,
            scale=common.scale(attn, d_head),
            bias=shared or attn.has("relative_position_bias_table"),
        ),
        mlp=common.mlp(block.mlp),
        ln1=common.norm(block.norm1),
        ln2=common.norm(block.norm2),
        attn_scale=scaled,
        mlp_scale=scaled,
    )


def _block_rows(block: Reader, shared: bool) -> str:
    at, bias = "blocks.{l}", "zeros"
    if block.attn.has("q_bias"):
        bias = f"[{at}.attn.q_bias, {at}.attn.k_bias, {at}.attn.v_bias]"
    owners = [f"{at}.attn"] * block.attn.has("relative_position_bias_table") + ["rel_pos_bias"] * shared
    tables = [f"{owner}.relative_position_{part}" for owner in owners for part in ("bias_table", "index")]
    return (
        norm_rows(f"{at}.norm1", f"{at}.ln1")
        + f"""
            {at}.attn.qkv.weight  ->  {at}.attn.qkv.weight
            {bias}                ->  {at}.attn.qkv.bias
            [{", ".join(tables)}]  ->  {at}.attn.attn_bias  :  {{bias}}
            {at}.gamma_1          ->  {at}.ls1.gamma
            {at}.gamma_2          ->  {at}.ls2.gamma
        """
        + linear_rows(f"{at}.attn.proj", f"{at}.attn.out")
        + norm_rows(f"{at}.norm2", f"{at}.ln2")
        + common.mlp_rows(block.mlp, f"{at}.mlp", f"{at}.mlp")
    )
