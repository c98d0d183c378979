"""transformers' VideoMAE: fixed positions, keys without a bias, the mean of all tokens before the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from prisma_core.plugin import BlockSpec, HookMap, MlpNames, ModelSpec, PoolSpec, Reader, WeightMap, linear_rows
from prisma_vivit import parts
from prisma_vivit.canonical.base import VideoAdapter

MODEL = "transformers.models.videomae.modeling_videomae.VideoMAEModel"
CLASSIFIER = "transformers.models.videomae.modeling_videomae.VideoMAEForVideoClassification"
QKV = ("query", "key", "value")
MLP = MlpNames("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")

IGNORED = {
    "VideoMAEPatchEmbeddings.patch_size": "the size of the tubelets",
    "VideoMAEPatchEmbeddings.tubelet_size": "the size of the tubelets",
    "VideoMAELayer.chunk_size_feed_forward": "upstream never uses it",
    "VideoMAELayer.seq_len_dim": "upstream never uses it",
}


class VideoMAEAdapter(VideoAdapter):
    """VideoMAEModel, whose main output is all tokens, and VideoMAEForVideoClassification."""

    types = (MODEL, CLASSIFIER)
    ignored: ClassVar[Mapping[str, str]] = {**parts.IGNORED, **IGNORED}

    def spec(self, upstream: Reader) -> ModelSpec:
        classifier = upstream.is_a(CLASSIFIER)
        base = upstream.videomae if classifier else upstream
        patches = base.embeddings.patch_embeddings
        embed, layout = parts.tubelets(patches.projection, tuple(patches.image_size), parts.frames(patches))
        averaged = classifier and upstream.has("fc_norm")
        return ModelSpec(
            d_model=patches.projection.out_channels,
            image_size=tuple(patches.image_size),
            embed=embed,
            layout=layout,
            blocks=tuple(_block(layer) for layer in base.encoder.layer),
            ln_final=parts.norm(base.layernorm) if base.has("layernorm") else None,
            pool=PoolSpec(kind="avg" if averaged else "token" if classifier else "none"),
            ln_pool=parts.norm(upstream.fc_norm) if averaged else None,
            d_pool=patches.projection.out_channels,
            n_classes=parts.classes(upstream.classifier) if classifier else None,
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        at = "videomae." if upstream.is_a(CLASSIFIER) else ""
        base = upstream.videomae if at else upstream
        positions = base.embeddings.position_embeddings
        like = parts.dtype_of(upstream)
        first = base.encoder.layer[0]
        layer = f"{at}encoder.layer.{{l}}"

        def fixed() -> Tensor:  # of no tensor that upstream saves: "zeros" in its row only holds the place
            return positions[0].to(**like)

        return WeightMap.parse(
            f"""
                {at}embeddings.patch_embeddings.projection.{{*}}  ->  embed.proj.{{*}}
                zeros                           ->  embed.pos_embed        : {{positions}}
                {layer}.layernorm_before.{{*}}  ->  blocks.{{l}}.ln1.{{*}}
                {layer}.layernorm_after.{{*}}   ->  blocks.{{l}}.ln2.{{*}}
                {at}layernorm.{{*}}             ->  ln_final.{{*}}
                fc_norm.{{*}}                   ->  ln_pool.{{*}}
                classifier.{{*}}                ->  head.{{*}}
            """
            + parts.READ.qkv_rows(first.attention.attention, f"{layer}.attention.attention", "blocks.{l}.attn.qkv", QKV)
            + linear_rows(f"{layer}.attention.output.dense", "blocks.{l}.attn.out")
            + parts.READ.mlp_rows(first, layer, "blocks.{l}.mlp", MLP),
            {"positions": fixed},
        )

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        at = "videomae." if upstream.is_a(CLASSIFIER) else ""
        layer, block = f"{at}encoder.layer.{{l}}", "blocks.{l}"
        tokens = f"{at}layernorm" if spec.ln_final else f"{at}encoder.layer.{spec.n_layers - 1}"
        rows = f"""
            {at}embeddings.patch_embeddings             ->  hook_embed
            {at}embeddings                              ->  hook_full_embed
            {layer} : in                                ->  {block}.hook_resid_pre
            {layer}.layernorm_before                    ->  {block}.ln1.hook_normalized
            {layer}.attention.attention.query           ->  {block}.attn.hook_q  : b p (h d) -> b p h d
            {layer}.attention.attention.key             ->  {block}.attn.hook_k  : b p (h d) -> b p h d
            {layer}.attention.attention.value           ->  {block}.attn.hook_v  : b p (h d) -> b p h d
            {layer}.attention.attention @ softmax : in  ->  {block}.attn.hook_attn_scores
            {layer}.attention.attention @ softmax       ->  {block}.attn.hook_pattern
            {layer}.attention.output.dense : in         ->  {block}.attn.hook_z  : b p (h d) -> b p h d
            {layer}.attention                           ->  {block}.hook_attn_out
            {layer}.layernorm_after : in                ->  {block}.hook_resid_mid
            {layer}.layernorm_after                     ->  {block}.ln2.hook_normalized
            {layer}.intermediate.dense                  ->  {block}.mlp.hook_pre
            {layer}.output.dense : in                   ->  {block}.mlp.hook_post
            {layer}.output.dense                        ->  {block}.hook_mlp_out
            {layer}                                     ->  {block}.hook_resid_post
            {at}layernorm                               ->  ln_final.hook_normalized
            {at}layernorm                               ->  hook_ln_final
            fc_norm                                     ->  ln_pool.hook_normalized
            {"classifier" if at else tokens}            ->  hook_logits
        """
        pooled = "fc_norm : in" if spec.ln_pool else "classifier : in" if at else tokens
        return HookMap.parse(f"{rows}\n{pooled} -> hook_pooled", h=spec.blocks[0].attn.n_heads)


def _block(layer: Reader) -> BlockSpec:
    attn = layer.attention.attention
    projections = (attn.query, attn.key, attn.value, layer.attention.output.dense)
    return BlockSpec(
        attn=parts.attention(attn, attn.num_attention_heads, attn.attention_head_size, *projections),
        mlp=parts.READ.mlp(layer, MLP),
        ln1=parts.norm(layer.layernorm_before),
        ln2=parts.norm(layer.layernorm_after),
    )
