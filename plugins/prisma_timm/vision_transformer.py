"""timm.models.vision_transformer.VisionTransformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from prisma_core.adapter import Adapter, Reader
from prisma_core.hookmap import HookMap
from prisma_core.layout import TokenLayout
from prisma_core.spec import AttentionSpec, BlockSpec, EmbedSpec, MlpSpec, ModelSpec, NormSpec, PoolSpec
from prisma_core.weights import WeightMap

WEIGHTS = """
    patch_embed.proj.weight             ->  embed.proj.weight
    patch_embed.proj.bias | zeros       ->  embed.proj.bias
    cls_token                           ->  embed.prefix                       : 1 n d -> n d
    pos_embed                           ->  embed.pos_embed                    : 1 p d -> p d
    norm_pre.{*}                        ->  ln_pre.{*}
    blocks.{l}.norm1.{*}                ->  blocks.{l}.ln1.{*}
    blocks.{l}.attn.qkv.weight          ->  blocks.{l}.attn.qkv.weight
    blocks.{l}.attn.qkv.bias | zeros    ->  blocks.{l}.attn.qkv.bias
    blocks.{l}.attn.proj.weight         ->  blocks.{l}.attn.out.weight
    blocks.{l}.attn.proj.bias | zeros   ->  blocks.{l}.attn.out.bias
    blocks.{l}.norm2.{*}                ->  blocks.{l}.ln2.{*}
    blocks.{l}.mlp.fc1.weight           ->  blocks.{l}.mlp.fc_in.weight
    blocks.{l}.mlp.fc1.bias | zeros     ->  blocks.{l}.mlp.fc_in.bias
    blocks.{l}.mlp.fc2.weight           ->  blocks.{l}.mlp.fc_out.weight
    blocks.{l}.mlp.fc2.bias | zeros     ->  blocks.{l}.mlp.fc_out.bias
    norm.{*}                            ->  ln_final.{*}
    head.{*}                            ->  head.{*}
"""

HOOKS = """
    patch_embed                  ->  hook_embed
    norm_pre : in                ->  hook_full_embed
    blocks.{l} : in              ->  blocks.{l}.hook_resid_pre
    blocks.{l}.norm1             ->  blocks.{l}.ln1.hook_normalized
    blocks.{l}.attn.q_norm       ->  blocks.{l}.attn.hook_q            : b h p d -> b p h d
    blocks.{l}.attn.k_norm       ->  blocks.{l}.attn.hook_k            : b h p d -> b p h d
    blocks.{l}.attn @ softmax : in  ->  blocks.{l}.attn.hook_attn_scores
    blocks.{l}.attn.attn_drop    ->  blocks.{l}.attn.hook_pattern
    blocks.{l}.attn.norm : in    ->  blocks.{l}.attn.hook_z            : b p (h d) -> b p h d
    blocks.{l}.drop_path1        ->  blocks.{l}.hook_attn_out
    blocks.{l}.norm2 : in        ->  blocks.{l}.hook_resid_mid
    blocks.{l}.norm2             ->  blocks.{l}.ln2.hook_normalized
    blocks.{l}.mlp.fc1           ->  blocks.{l}.mlp.hook_pre
    blocks.{l}.mlp.fc2 : in      ->  blocks.{l}.mlp.hook_post
    blocks.{l}.drop_path2        ->  blocks.{l}.hook_mlp_out
    blocks.{l}                   ->  blocks.{l}.hook_resid_post
    norm                         ->  hook_ln_final
    fc_norm : in                 ->  hook_pooled
    head                         ->  hook_logits
"""


class VisionTransformerAdapter(Adapter):
    types = ("timm.models.vision_transformer.VisionTransformer",)

    def spec(self, upstream: Reader) -> ModelSpec:
        patch = upstream.patch_embed
        rows, columns = patch.grid_size
        return ModelSpec(
            d_model=upstream.embed_dim,
            image_size=patch.img_size,
            embed=EmbedSpec(patch=patch.patch_size, in_channels=patch.proj.in_channels),
            layout=TokenLayout(cls=int(upstream.has_class_token), registers=upstream.num_reg_tokens, rows=rows, columns=columns),
            blocks=tuple(_block(block) for block in upstream.blocks),
            ln_final=NormSpec(eps=upstream.norm.eps),
            pool=PoolSpec(kind="token"),
            d_pool=upstream.embed_dim,
            n_classes=upstream.num_classes or None,
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        return WeightMap.parse(WEIGHTS)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        return HookMap.parse(HOOKS, h=spec.blocks[0].attn.n_heads)

    @contextmanager
    def explicit(self, upstream: nn.Module) -> Iterator[None]:
        fused = [module for module in upstream.modules() if getattr(module, "fused_attn", False)]
        for module in fused:
            module.fused_attn = False
        try:
            yield
        finally:
            for module in fused:
                module.fused_attn = True


def _block(block: Reader) -> BlockSpec:
    attn, mlp = block.attn, block.mlp
    return BlockSpec(
        attn=AttentionSpec(n_heads=attn.num_heads, n_kv_heads=attn.num_heads, d_head=attn.head_dim, scale=attn.scale),
        mlp=MlpSpec(d_mlp=mlp.fc1.out_features, act="gelu"),
        ln1=NormSpec(eps=block.norm1.eps),
        ln2=NormSpec(eps=block.norm2.eps),
    )
