"""The adapter of published toys: facts, weight map, hook map."""

from __future__ import annotations

from typing import Any

from prisma_core import ModelSpec, TokenLayout
from prisma_core.plugin import (
    Adapter,
    AnySpec,
    AttentionSpec,
    BlockSpec,
    EmbedSpec,
    HookMap,
    MlpSpec,
    NormSpec,
    PoolSpec,
    Reader,
    WeightMap,
)

WEIGHTS = """
    embed.proj.{*}            ->  embed.proj.{*}
    pos_embed.W_pos           ->  embed.pos_embed
    blocks.{l}.ln{n}.w | ones     ->  blocks.{l}.ln{n}.weight
    blocks.{l}.ln{n}.b | zeros    ->  blocks.{l}.ln{n}.bias
    [blocks.{l}.attn.W_Q, blocks.{l}.attn.W_K, blocks.{l}.attn.W_V]  ->  blocks.{l}.attn.qkv.weight  : h m d -> (h d) m
    [blocks.{l}.attn.b_Q, blocks.{l}.attn.b_K, blocks.{l}.attn.b_V]  ->  blocks.{l}.attn.qkv.bias    : h d -> (h d)
    blocks.{l}.attn.W_O       ->  blocks.{l}.attn.out.weight    : h d m -> m (h d)
    blocks.{l}.attn.b_O       ->  blocks.{l}.attn.out.bias
    blocks.{l}.mlp.W_in       ->  blocks.{l}.mlp.fc_in.weight   : m f -> f m
    blocks.{l}.mlp.b_in       ->  blocks.{l}.mlp.fc_in.bias
    blocks.{l}.mlp.W_out      ->  blocks.{l}.mlp.fc_out.weight  : f m -> m f
    blocks.{l}.mlp.b_out      ->  blocks.{l}.mlp.fc_out.bias
    ln_pre.w | ones           ->  ln_pre.weight
    ln_pre.b | zeros          ->  ln_pre.bias
    ln_final.w | ones         ->  ln_final.weight
    ln_final.b | zeros        ->  ln_final.bias
    head.W_H                  ->  head.weight                   : m c -> c m
    head.b_H                  ->  head.bias
"""

HOOKS = """
    embed                             ->  hook_embed
    pos_embed                         ->  hook_full_embed
    ln_pre                            ->  hook_ln_pre
    blocks.{l} : in                   ->  blocks.{l}.hook_resid_pre
    blocks.{l}.ln1                    ->  blocks.{l}.ln1.hook_normalized
    blocks.{l}.attn @ add             ->  blocks.{l}.attn.hook_q  : b h p d -> b p h d
    blocks.{l}.attn @ add#1           ->  blocks.{l}.attn.hook_k  : b h p d -> b p h d
    blocks.{l}.attn @ add#2           ->  blocks.{l}.attn.hook_v  : b h p d -> b p h d
    blocks.{l}.attn @ softmax : in    ->  blocks.{l}.attn.hook_attn_scores
    blocks.{l}.attn @ softmax         ->  blocks.{l}.attn.hook_pattern
    blocks.{l}.attn @ matmul#1        ->  blocks.{l}.attn.hook_z  : b h p d -> b p h d
    blocks.{l}.attn                   ->  blocks.{l}.hook_attn_out
    blocks.{l}.ln2                    ->  blocks.{l}.ln2.hook_normalized
    blocks.{l}.mlp @ add              ->  blocks.{l}.mlp.hook_pre
    blocks.{l}.mlp @ matmul#1 : in    ->  blocks.{l}.mlp.hook_post
    blocks.{l}.mlp                    ->  blocks.{l}.hook_mlp_out
    blocks.{l}                        ->  blocks.{l}.hook_resid_post
    ln_final                          ->  hook_ln_final
    head : in                         ->  hook_pooled
    head                              ->  hook_logits
"""


class PublishedAdapter(Adapter):
    """The Prisma project's toys."""

    types = ("prisma_toy.published.PublishedViT",)

    def spec(self, upstream: Reader) -> ModelSpec:
        side, proj = upstream.side, upstream.embed.proj
        proj.expect("Conv2d", stride=proj.kernel_size, padding=(0, 0), dilation=(1, 1), groups=1, padding_mode="zeros")
        width, classes = upstream.head.W_H.shape
        rows, columns = proj.kernel_size
        return ModelSpec(
            d_model=width,
            image_size=(side * rows, side * columns),
            embed=EmbedSpec(patch=(rows, columns), in_channels=proj.in_channels),
            layout=TokenLayout(cls=int(upstream.has_token), rows=side, columns=side),
            blocks=tuple(_block(block) for block in upstream.blocks),
            ln_pre=_norm(upstream, "ln_pre"),
            ln_final=_norm(upstream, "ln_final"),
            pool=PoolSpec(kind=upstream.pool, with_prefix=upstream.pool == "avg" and upstream.has_token),
            d_pool=width,
            n_classes=classes,
        )

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        with_token = "cls_token -> embed.prefix : 1 n d -> n d\n"
        without = "ignore cls_token : the tokens do not hold it\n"
        return WeightMap.parse((with_token if upstream.has_token else without) + WEIGHTS, h=_heads(spec))

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        before_mlp = "ln2" if next(iter(upstream.blocks)).has("ln2") else "mlp"
        return HookMap.parse(HOOKS + f"blocks.{{l}}.{before_mlp} : in  ->  blocks.{{l}}.hook_resid_mid")


def _heads(spec: Any) -> int:
    return spec.blocks[0].attn.n_heads


def _block(block: Reader) -> BlockSpec:
    heads, _, d_head = block.attn.W_Q.shape
    mlp = MlpSpec(d_mlp=block.mlp.W_in.shape[1], act=block.mlp.act) if block.has("mlp") else None
    return BlockSpec(
        attn=AttentionSpec(n_heads=heads, n_kv_heads=heads, d_head=d_head, scale=d_head**-0.5),
        mlp=mlp,
        ln1=_norm(block, "ln1"),
        ln2=_norm(block, "ln2"),
    )


def _norm(parent: Reader, name: str) -> NormSpec | None:
    return NormSpec(eps=getattr(parent, name).eps) if parent.has(name) else None
