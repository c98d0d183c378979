"""timm's VisionTransformer: the plain, convolution-stemmed, parallel, CLIP-like and distilled ones."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

from torch import nn

from prisma_core.plugin import (
    Adapter,
    EmbedSpec,
    HookMap,
    Interpolation,
    ModelSpec,
    PoolSpec,
    Reader,
    TokenLayout,
    WeightMap,
    linear_rows,
    norm_rows,
    per_block_table,
    same_for_all,
)
from prisma_timm.canonical import blocks, common, latents

DISTILLED = "timm.models.deit.VisionTransformerDistilled"
HYBRID = "timm.layers.hybrid_embed.HybridEmbed"

IGNORED = {
    "VisionTransformer.global_pool": "read where there is no attention pooling",
    "VisionTransformerDistilled.distilled_training": "two outputs in training; evaluation returns their mean",
}


class VisionTransformerAdapter(Adapter):
    """VisionTransformer and VisionTransformerDistilled."""

    types = ("timm.models.vision_transformer.VisionTransformer", DISTILLED)
    ignored: ClassVar[Mapping[str, str]] = {**common.IGNORED, **blocks.IGNORED, **IGNORED}

    def spec(self, upstream: Reader) -> ModelSpec:
        distilled = upstream.is_a(DISTILLED)
        rows, columns = common.grid(upstream.patch_embed)
        layout = TokenLayout(
            cls=int(upstream.has_class_token),
            distillation=int(distilled),
            registers=upstream.num_reg_tokens,
            rows=rows,
            columns=columns,
        )
        ln_pool = common.norm(upstream.fc_norm)
        if distilled and (ln_pool is not None or upstream.has("attn_pool")):
            raise upstream.unsupported("a norm or attention before two heads")
        if distilled and common.classes(upstream.head_dist) != common.classes(upstream.head):
            raise upstream.unsupported("two heads of different classes")
        return ModelSpec(
            d_model=upstream.embed_dim,
            image_size=upstream.patch_embed.img_size,
            embed=_embed(upstream),
            layout=layout,
            blocks=tuple(blocks.block(block) for block in upstream.blocks),
            ln_pre=common.norm(upstream.norm_pre),
            ln_final=common.norm(upstream.norm),
            pool=_pool(upstream),
            ln_pool=ln_pool,
            d_pool=upstream.attn_pool.out_features if upstream.has("attn_pool") else upstream.embed_dim,
            n_classes=common.classes(upstream.head),
            n_heads_out=2 if distilled else 1,
        )

    def stem(self, upstream: Reader, spec: ModelSpec) -> nn.Module | None:
        return upstream.patch_embed.module if spec.embed.stem == "opaque" else None

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        rows = common.end_rows() + "head_dist.{*}  ->  head_dist.{*}\n"
        if spec.embed.stem == "opaque":
            rows += "patch_embed.{*}  ->  embed.stem.{*}\n"
        else:
            rows += linear_rows("patch_embed.proj", "embed.proj")
            rows += norm_rows("patch_embed.norm", "embed.norm")
        prefix = [name for name in ("cls_token", "dist_token", "reg_token") if upstream.has(name)]
        rows += f"[{', '.join(prefix)}]  ->  embed.prefix  : 1 n d -> n d\n"
        without_prefix = upstream.no_embed_class and spec.layout.n_prefix
        rows += f"{'[zeros, pos_embed]' if without_prefix else 'pos_embed'}  ->  embed.pos_embed  : 1 p d -> p d\n"
        if spec.pool.kind == "attention":
            rows += latents.pool_rows(upstream.attn_pool, "attn_pool")
        rows += same_for_all(upstream, [blocks.block_rows(block) for block in upstream.blocks])
        return WeightMap.parse(rows)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        as_grid = "  : b r c d -> b (r c) d" if upstream.dynamic_img_size else ""
        rows = f"""
            patch_embed       ->  hook_embed                    {as_grid}
            patch_embed.norm  ->  embed.norm.hook_normalized    {as_grid}
            norm_pre : in     ->  hook_full_embed
        """
        rows += common.STREAM_HOOKS
        if spec.n_heads_out == 2:
            rows += """
                head : in       ->  hook_pooled
                head_dist : in  ->  hook_pooled_dist
                                ->  hook_logits
            """
        else:
            rows += common.HEAD_HOOKS
        if spec.pool.kind == "attention":
            rows += latents.pool_hooks(upstream.attn_pool, "attn_pool")
        rows += per_block_table([blocks.block_hooks(block) for block in upstream.blocks])
        latent_heads = spec.pool.attn.n_heads if spec.pool.attn else 1
        return HookMap.parse(rows, h=spec.blocks[0].attn.n_heads, n=latent_heads)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)


def _embed(upstream: Reader) -> EmbedSpec:
    patch, pos, dynamic = upstream.patch_embed, upstream.has("pos_embed"), upstream.dynamic_img_size
    if not patch.is_a(HYBRID):
        return common.patch_embed(patch, pos=pos, dynamic=dynamic)
    if patch.dynamic_img_pad:
        raise patch.unsupported("padding of images")
    return EmbedSpec(
        patch=tuple(ratio * side for ratio, side in zip(patch.feature_ratio, patch.patch_size, strict=True)),
        in_channels=patch.in_chans,
        stem="opaque",
        pos=pos,
        interpolation=Interpolation() if dynamic else None,
    )


def _pool(upstream: Reader) -> PoolSpec:
    if upstream.has("attn_pool"):
        return latents.pool(upstream.attn_pool, with_prefix=upstream.pool_include_prefix)
    return common.pool(upstream, with_prefix=upstream.pool_include_prefix)
