"""transformers' V-JEPA 2 encoder: no positions but rotary ones, of frame, row and column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from prisma_core import count_tables
from prisma_core.plugin import (
    BlockSpec,
    HookMap,
    Interpolation,
    MlpNames,
    ModelSpec,
    PoolSpec,
    Reader,
    RopeCount,
    RopeSpec,
    WeightMap,
    linear_rows,
)
from prisma_vivit import parts
from prisma_vivit.canonical.base import VideoAdapter

MODEL = "transformers.models.vjepa2.modeling_vjepa2.VJEPA2Model"
THETA = 10000.0  # written into upstream's code
MLP = MlpNames(act="activation")

IGNORED = {
    "VJEPA2Embeddings.patch_size": "the size of the tubelets",
    "VJEPA2PatchEmbeddings3D.patch_size": "the size of the tubelets",
    "VJEPA2PatchEmbeddings3D.tubelet_size": "the size of the tubelets",
    "VJEPA2Layer.num_attention_heads": "read from its attention",
    "VJEPA2Layer.mlp_ratio": "read from its projections",
    "VJEPA2Layer.drop_path": "off in evaluation",
    "VJEPA2DropPath.drop_prob": "off in evaluation",
    "VJEPA2RopeAttention.dropout": "off in evaluation",
    "VJEPA2RopeAttention.grid_depth": "upstream never uses it",
    "VJEPA2PredictorEmbeddings.*": "the predictor is a model of its own",
}


class VJEPA2Adapter(VideoAdapter):
    """VJEPA2Model, whose main output is what the encoder makes of all tokens.

    Upstream turns neighbouring channels by tables laid out for halves: a table like any other, for us. Tokens of frames
    of another size are counted as if they had the native one, as upstream does.
    """

    types = (MODEL,)
    ignored: ClassVar[Mapping[str, str]] = {**parts.IGNORED, **IGNORED}

    def spec(self, upstream: Reader) -> ModelSpec:
        config, encoder = upstream.module.config, upstream.encoder
        proj, size = encoder.embeddings.patch_embeddings.proj, (config.crop_size, config.crop_size)
        embed, layout = parts.tubelets(
            proj, size, config.frames_per_clip, pos=False, any_length=True, interpolation=Interpolation()
        )
        for layer in upstream.predictor.layer:
            block(layer)  # the predictor is not part of this model, and yet its facts are looked at
        parts.norm(upstream.predictor.layernorm)
        return ModelSpec(
            d_model=proj.out_channels,
            image_size=size,
            embed=embed,
            layout=layout,
            blocks=tuple(block(layer) for layer in encoder.layer),
            rope=_rope(encoder.layer),
            ln_final=parts.norm(encoder.layernorm),
            pool=PoolSpec(kind="none"),
            d_pool=proj.out_channels,
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        assert spec.rope is not None
        assert isinstance(spec.rope.grid, RopeCount)
        rope, layout, like = spec.rope.grid, spec.layout, torch.empty((), **parts.dtype_of(upstream))

        def tables() -> Tensor:  # of no tensor of upstream's: "zeros" in their row only holds the place
            d_head = spec.blocks[0].attn.d_head
            return torch.cat(count_tables(rope, "interleaved", layout.n_patches, 0, d_head, like))

        first = upstream.encoder.layer[0]
        layer = "encoder.layer.{l}"
        return WeightMap.parse(
            f"""
                encoder.embeddings.patch_embeddings.proj.{{*}}  ->  embed.proj.{{*}}
                zeros                 ->  [rope_cos, rope_sin]  :  {{rope}}
                {layer}.norm1.{{*}}   ->  blocks.{{l}}.ln1.{{*}}
                {layer}.norm2.{{*}}   ->  blocks.{{l}}.ln2.{{*}}
                encoder.layernorm.{{*}}  ->  ln_final.{{*}}
                ignore predictor.{{*}} : the predictor is a model of its own, which reads what this one returns
            """
            + parts.READ.qkv_rows(
                first.attention, f"{layer}.attention", "blocks.{l}.attn.qkv", ("query", "key", "value")
            )
            + linear_rows(f"{layer}.attention.proj", "blocks.{l}.attn.out")
            + parts.READ.mlp_rows(first.mlp, f"{layer}.mlp", "blocks.{l}.mlp", MLP),
            {"rope": tables},
        )

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        layer, block = "encoder.layer.{l}", "blocks.{l}"
        return HookMap.parse(
            f"""
                encoder.embeddings                ->  hook_embed
                encoder.embeddings                ->  hook_full_embed
                {layer} : in                      ->  {block}.hook_resid_pre
                {layer}.norm1                     ->  {block}.ln1.hook_normalized
                {layer}.attention.query           ->  {block}.attn.hook_q      : b p (h d) -> b p h d
                {layer}.attention.key             ->  {block}.attn.hook_k      : b p (h d) -> b p h d
                {layer}.attention.value           ->  {block}.attn.hook_v      : b p (h d) -> b p h d
                {layer}.attention @ cat           ->  {block}.attn.hook_rot_k  : b h p d -> b p h d
                {layer}.attention @ cat#1         ->  {block}.attn.hook_rot_q  : b h p d -> b p h d
                {layer}.attention @ softmax : in  ->  {block}.attn.hook_attn_scores
                {layer}.attention @ softmax       ->  {block}.attn.hook_pattern
                {layer}.attention.proj : in       ->  {block}.attn.hook_z      : b p (h d) -> b p h d
                {layer}.attention                 ->  {block}.hook_attn_out
                {layer}.norm2 : in                ->  {block}.hook_resid_mid
                {layer}.norm2                     ->  {block}.ln2.hook_normalized
                {layer}.mlp.fc1                   ->  {block}.mlp.hook_pre
                {layer}.mlp.fc2 : in              ->  {block}.mlp.hook_post
                {layer}.mlp                       ->  {block}.hook_mlp_out
                {layer}                           ->  {block}.hook_resid_post
                encoder.layernorm                 ->  ln_final.hook_normalized
                encoder.layernorm                 ->  hook_ln_final
                encoder.layernorm                 ->  hook_pooled
                encoder.layernorm                 ->  hook_logits
            """,
            h=spec.blocks[0].attn.n_heads,
        )


def block(layer: Reader) -> BlockSpec:
    """Return the facts of a block."""
    attn = layer.attention
    projections = (attn.query, attn.key, attn.value, attn.proj)
    return BlockSpec(
        attn=parts.attention(attn, attn.num_attention_heads, attn.attention_head_size, *projections),
        mlp=parts.READ.mlp(layer.mlp, MLP),
        ln1=parts.norm(layer.norm1),
        ln2=parts.norm(layer.norm2),
    )


def _rope(layers: Reader) -> RopeSpec:
    first, attentions = layers[0].attention, [layer.attention for layer in layers]
    facts = {(attn.d_dim, attn.h_dim, attn.w_dim, attn.grid_size) for attn in attentions}
    (frame, row, column, side), *others = facts
    if others or len({frame, row, column}) != 1 or not frame:
        raise first.unsupported("rotary positions that turn different numbers of channels, or none")
    if first.attention_head_size % 2:
        raise first.unsupported("rotary positions in heads of an odd number of channels")
    grid = RopeCount(pairs=frame // 2, theta=THETA, tiled=True, rows=side, columns=side)
    return RopeSpec(layout="interleaved", grid=grid)
