"""timm's vision encoders of language models with a classifier on top: Qwen3-VL's and DeepSeek-V4's."""

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
    same_for_all,
)
from prisma_timm.canonical import common, eva
from prisma_timm.canonical import rope as ropes

QWEN3 = "timm.models.qwen3_vit.Qwen3VitClassifier"
DEEPSEEK = "timm.models.deepseek_vit.DeepseekVitClassifier"
HOOKS = """
    encoder.patch_embed    ->  hook_embed                : b r c d -> b (r c) d
    encoder.blocks.0 : in  ->  hook_full_embed
    encoder.norm           ->  ln_final.hook_normalized
    encoder.norm           ->  hook_ln_final
    norm : in              ->  hook_pooled
    norm                   ->  ln_pool.hook_normalized
    head                   ->  hook_logits
"""


class EncoderAdapter(Adapter):
    """Blocks with rotary attention on patches alone; with or without learned positions and a final norm."""

    types = (
        QWEN3,
        DEEPSEEK,
        "timm.models.qwen3_vit.Qwen3VitEncoder",
        "timm.models.deepseek_vit.DeepseekVitEncoder",
    )
    ignored: ClassVar[Mapping[str, str]] = {
        **common.IGNORED,
        **ropes.IGNORED,
        **eva.IGNORED,
        "*.output_fmt": "how tokens are laid out between modules",
        "*.feature_dim": "how tokens are laid out between modules",
        "*Classifier.embed_dim": "the width of the encoder, which is read",
        "*.out_features": "the width of a projector, and that is refused",
        "*.merge_size": "of a projector, and that is refused",
        "*.downsample_ratio": "of a projector, and that is refused",
        "*.encoder_pool": "read from the encoder",
    }

    def spec(self, upstream: Reader) -> ModelSpec:
        encoder = _encoder(upstream)
        rows, columns = common.grid(encoder.patch_embed)
        rope = ropes.rope(encoder.rope, eva.turning(encoder.blocks), dynamic=True)
        embed = _embed(encoder)
        if rope.grid is None:
            if embed.pos_grid is not None:
                raise encoder.rope.unsupported("frequencies of its own, with positions of another grid")
            embed = embed.model_copy(update={"interpolation": None})
        return ModelSpec(
            d_model=encoder.embed_dim,
            image_size=encoder.patch_embed.img_size,
            embed=embed,
            layout=TokenLayout(rows=rows, columns=columns),
            blocks=tuple(eva.block(one) for one in encoder.blocks),
            rope=rope,
            ln_final=common.norm(encoder.norm) if upstream.is_a(DEEPSEEK) else None,
            pool=PoolSpec(kind="avg" if upstream.global_pool == "avg" else "none"),
            ln_pool=common.norm(upstream.norm),
            d_pool=encoder.embed_dim,
            n_classes=common.classes(upstream.head),
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        assert spec.rope is not None
        at, encoder = "encoder.blocks.{l}", upstream.encoder
        table = (
            linear_rows("encoder.patch_embed.proj", "embed.proj")
            + norm_rows("encoder.patch_embed.norm", "embed.norm")
            + """
            encoder.pos_embed  ->  embed.pos_embed  :  1 p d -> p d
            """
            + same_for_all(encoder, [eva.block_rows(one, at, "blocks.{l}") for one in encoder.blocks])
            + norm_rows("encoder.norm", "ln_final")
            + norm_rows("norm", "ln_pool")
            + linear_rows("head", "head")
            + ropes.rope_rows(encoder.rope, "encoder.rope")
        )
        return WeightMap.parse(table, {"rope": ropes.rope_tables(encoder.rope, spec.rope, spec.layout)})

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        at, encoder, attn = "encoder.blocks.{l}", upstream.encoder, spec.blocks[0].attn
        rows = same_for_all(encoder, [eva.block_hooks(one, at, "blocks.{l}") for one in encoder.blocks])
        return HookMap.parse(HOOKS + rows, h=attn.n_heads, w=attn.d_head)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)


def _encoder(upstream: Reader) -> Reader:
    wrapped = upstream.is_a(QWEN3, DEEPSEEK)
    encoder = upstream.encoder if wrapped else upstream
    for projector in ("merger", "aligner"):
        if encoder.has(projector):
            raise getattr(encoder, projector).unsupported("a projector that merges patches behind the encoder")
    if not wrapped:
        raise upstream.unsupported("an output that is a grid of tokens")
    if encoder.global_pool:
        raise encoder.unsupported(f"pooling twice, first {encoder.global_pool!r}")
    return encoder


def _embed(encoder: Reader) -> EmbedSpec:
    patch = encoder.patch_embed
    if not encoder.has("pos_embed"):
        return common.patch_embed(patch, pos=False, dynamic=True)
    kept = (encoder.pos_embed_grid_size, encoder.pos_embed_grid_size)
    how = Interpolation(mode="bilinear", antialias=False, align_corners=True, in_float32=False)
    native = {"pos_grid": kept if kept != tuple(patch.grid_size) else None, "interpolation": how}
    return common.patch_embed(patch, pos=True, dynamic=True).model_copy(update=native)
