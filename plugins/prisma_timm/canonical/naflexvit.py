"""timm.models.naflexvit.NaFlexVit, called with images."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import nn

from prisma_core.plugin import (
    Adapter,
    BlockSpec,
    EmbedSpec,
    HookMap,
    Interpolation,
    ModelSpec,
    Reader,
    TokenLayout,
    WeightMap,
    norm_rows,
    plain_patches,
    same_for_all,
)
from prisma_timm.canonical import blocks, common, eva, latents
from prisma_timm.canonical import rope as ropes

EMBEDS = "timm.models.naflexvit.NaFlexEmbeds"
EVA_BLOCK = "timm.models.eva.EvaBlock"
HOOKS = """
    embeds.norm      ->  hook_embed
    embeds.norm      ->  embed.norm.hook_normalized
    embeds.pos_drop  ->  hook_full_embed
"""


class NaFlexVitAdapter(Adapter):
    """Images of any size; batches of patches with coordinates are not taken."""

    types = ("timm.models.naflexvit.NaFlexVit",)
    ignored: ClassVar[Mapping[str, str]] = {
        **common.IGNORED,
        **ropes.IGNORED,
        **eva.IGNORED,
        **blocks.IGNORED,
        "NaFlexVit.global_pool": "read where there is no attention pooling",
        "NaFlexVit.use_key_only_attn_mask": "images need no mask",
        "NaFlexVit.num_*_tokens": "read from the embedding",
        "NaFlexVit.has_class_token": "read from the embedding",
        "NaFlexVit.rope_is_mixed": "read from the rotary embedding",
        "*.supports_patch_interpolation": "patches of an image have one size",
        "NaFlexEmbeds.enable_patch_interpolator": "patches of an image have one size",
        "NaFlexEmbeds.patch_interpolator": "patches of an image have one size",
        "NaFlexEmbeds.pos_embed_use_grid_sample": "only for patches with coordinates",
        "NaFlexEmbeds.pos_embed_*": "read where there are positions",
        "NaFlexEmbeds.embed_dim": "read from the model",
        "NaFlexEmbeds.has_class_token": "read from the class token",
        "NaFlexEmbeds.num_reg_tokens": "read from the registers",
        "NaFlexEmbeds.channels_last": "read where patches are projected by a linear layer",
        "NaFlexEmbeds.flatten": "how patches are laid out in memory between modules",
        "NaFlexEmbeds.default_img_size": "the configuration says the native size",
    }

    def spec(self, upstream: Reader) -> ModelSpec:
        embeds = upstream.embeds
        if not embeds.is_a(EMBEDS):
            raise embeds.unsupported("its patch embedding")
        size = _native(upstream)
        rows, columns = (side // patch for side, patch in zip(size, embeds.patch_size, strict=True))
        layout = TokenLayout(
            cls=int(embeds.has("cls_token")),
            registers=embeds.reg_token.shape[1] if embeds.has("reg_token") else 0,
            rows=rows,
            columns=columns,
        )
        rope = ropes.rope(upstream.rope, eva.turning(upstream.blocks), True) if upstream.has("rope") else None
        embed = _embed(embeds, (rows, columns))
        if rope is not None and rope.grid is None:
            if embed.pos_grid is not None:
                raise upstream.rope.unsupported("frequencies of its own, with positions of another grid")
            embed = embed.model_copy(update={"interpolation": None})
        mapped, with_prefix = upstream.has("attn_pool"), upstream.pool_include_prefix
        if mapped:
            pool = latents.pool(upstream.attn_pool, with_prefix=with_prefix)
        else:
            pool = common.pool(upstream, with_prefix=with_prefix)
        return ModelSpec(
            d_model=upstream.embed_dim,
            image_size=size,
            embed=embed,
            layout=layout,
            blocks=tuple(_block(block) for block in upstream.blocks),
            rope=rope,
            ln_pre=common.norm(upstream.norm_pre),
            ln_final=common.norm(upstream.norm),
            pool=pool,
            ln_pool=common.norm(upstream.fc_norm),
            d_pool=upstream.attn_pool.out_features if mapped else upstream.embed_dim,
            n_classes=common.classes(upstream.head),
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        embeds, at = upstream.embeds, "blocks.{l}"
        prefix = [f"embeds.{name}" for name in ("cls_token", "reg_token") if embeds.has(name)]
        order = ""
        if embeds.is_linear:
            order = ": d (h w c) -> d c h w" if embeds.channels_last else ": d (c h w) -> d c h w"
        table = (
            f"""
            embeds.proj.weight        ->  embed.proj.weight  {order}
            embeds.proj.bias | zeros  ->  embed.proj.bias
            [{", ".join(prefix)}]     ->  embed.prefix       : 1 n d -> n d
            embeds.pos_embed_y        ->  embed.pos_rows     : 1 p d -> p d
            embeds.pos_embed_x        ->  embed.pos_columns  : 1 p d -> p d
            {"[zeros, embeds.pos_embed]" if prefix else "embeds.pos_embed"}  ->  embed.pos_embed  : 1 y x d -> (y x) d
            """
            + norm_rows("embeds.norm", "embed.norm")
            + same_for_all(upstream, [_rows(block, at) for block in upstream.blocks])
            + common.end_rows()
        )
        if upstream.has("attn_pool"):
            table += "\n" + latents.pool_rows(upstream.attn_pool, "attn_pool")
        functions: dict[str, Any] = {}
        if spec.rope is not None:
            table += ropes.rope_rows(upstream.rope, "rope")
            functions["rope"] = ropes.rope_tables(upstream.rope, spec.rope, spec.layout)
        height, width = spec.embed.patch
        kept = embeds.pos_embed.shape[1] if embeds.has("pos_embed") else 1
        return WeightMap.parse(table, functions, h=height, w=width, y=kept)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        attn, latent = spec.blocks[0].attn, spec.pool.attn
        rows = same_for_all(upstream, [_hooks(block, "blocks.{l}") for block in upstream.blocks])
        if upstream.has("attn_pool"):
            rows += latents.pool_hooks(upstream.attn_pool, "attn_pool")
        return HookMap.parse(
            HOOKS + common.END_HOOKS + rows, h=attn.n_heads, w=attn.d_head, n=latent.n_heads if latent else 1
        )

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)


def _block(block: Reader) -> BlockSpec:
    return eva.block(block) if block.is_a(EVA_BLOCK) else blocks.block(block)


def _rows(block: Reader, at: str) -> str:
    return eva.block_rows(block, at, at) if block.is_a(EVA_BLOCK) else blocks.block_rows(block)


def _hooks(block: Reader, at: str) -> str:
    return eva.block_hooks(block, at, at) if block.is_a(EVA_BLOCK) else blocks.block_hooks(block)


def _native(upstream: Reader) -> tuple[int, int]:
    """Return the size of image the configuration speaks of, or else the one that positions are kept for."""
    patch = upstream.embeds.patch_size
    config = upstream.get("pretrained_cfg") or {}
    if "input_size" in config:
        size = tuple(config["input_size"][1:])
        if not any(side % step for side, step in zip(size, patch, strict=True)):
            return size
    if upstream.embeds.has("pos_embed_grid_size"):
        rows, columns = upstream.embeds.pos_embed_grid_size
        return rows * patch[0], columns * patch[1]
    raise upstream.unsupported("no native image size")


def _embed(embeds: Reader, native: tuple[int, int]) -> EmbedSpec:
    if embeds.has("norm_input"):
        raise embeds.unsupported("a norm of pixels")
    if embeds.dynamic_img_pad:
        raise embeds.unsupported("padding of images")
    if not embeds.is_linear:
        plain_patches(embeds.proj)
    elif not embeds.proj.is_a("Linear"):
        raise embeds.proj.unsupported("its patch projection")
    kind = embeds.pos_embed_type
    if kind not in ("learned", "factorized", "none"):
        raise embeds.unsupported(f"{kind!r} positions")
    how, kept = Interpolation(), native
    if kind != "none":
        learned = kind == "learned"
        kept = embeds.pos_embed.shape[1:3] if learned else (embeds.pos_embed_y.shape[1], embeds.pos_embed_x.shape[1])
        kept = tuple(kept)
        how = Interpolation(
            mode=embeds.pos_embed_interp_mode,
            antialias=embeds.pos_embed_antialias,
            align_corners=embeds.pos_embed_align_corners,
            square=embeds.pos_embed_ar_preserving,
        )
    return EmbedSpec(
        patch=embeds.patch_size,
        in_channels=embeds.in_chans,
        norm=common.norm(embeds.norm),
        pos=kind != "none",
        pos_grid=kept if kept != native else None,
        pos_factorized=kind == "factorized",
        interpolation=how,
    )
