"""transformers' ViViT: tubelets, a class token, learned positions for every frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from prisma_core.plugin import BlockSpec, HookMap, MlpNames, ModelSpec, PoolSpec, Reader, WeightMap, linear_rows
from prisma_vivit import parts
from prisma_vivit.canonical.base import VideoAdapter

MODEL = "transformers.models.vivit.modeling_vivit.VivitModel"
CLASSIFIER = "transformers.models.vivit.modeling_vivit.VivitForVideoClassification"
MLP = MlpNames(act="activation_fn")

IGNORED = {
    "VivitEmbeddings.image_size": "read from the tubelet embedding",
    "VivitEmbeddings.patch_size": "the size of the tubelets",
    "VivitModel.pooler": "its output stands beside the main one",
    "VivitPooler.*": "its output stands beside the main one",
}


class VivitAdapter(VideoAdapter):
    """VivitModel, whose main output is all tokens, and VivitForVideoClassification.

    Frames of another size are refused: upstream's ``interpolate_pos_encoding`` forgets that there are frames.
    """

    types = (MODEL, CLASSIFIER)
    ignored: ClassVar[Mapping[str, str]] = {**parts.IGNORED, **IGNORED}

    def spec(self, upstream: Reader) -> ModelSpec:
        base = upstream.vivit if upstream.is_a(CLASSIFIER) else upstream
        patches = base.embeddings.patch_embeddings
        embed, layout = parts.tubelets(patches.projection, tuple(patches.image_size), parts.frames(patches), cls=1)
        width = patches.projection.out_channels
        return ModelSpec(
            d_model=width,
            image_size=tuple(patches.image_size),
            embed=embed,
            layout=layout,
            blocks=tuple(_block(layer) for layer in base.layers),
            ln_final=parts.norm(base.layernorm),
            pool=PoolSpec(kind="token" if upstream.is_a(CLASSIFIER) else "none"),
            d_pool=width,
            n_classes=parts.classes(upstream.classifier) if upstream.is_a(CLASSIFIER) else None,
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        at = "vivit." if upstream.is_a(CLASSIFIER) else ""
        base = upstream.vivit if at else upstream
        first = base.layers[0]
        layer = f"{at}layers.{{l}}"
        return WeightMap.parse(
            f"""
                {at}embeddings.cls_token                       ->  embed.prefix     : 1 n d -> n d
                {at}embeddings.position_embeddings             ->  embed.pos_embed  : 1 p d -> p d
                {at}embeddings.patch_embeddings.projection.{{*}}  ->  embed.proj.{{*}}
                {layer}.layernorm_before.{{*}}                 ->  blocks.{{l}}.ln1.{{*}}
                {layer}.layernorm_after.{{*}}                  ->  blocks.{{l}}.ln2.{{*}}
                {at}layernorm.{{*}}                            ->  ln_final.{{*}}
                classifier.{{*}}                               ->  head.{{*}}
                ignore pooler.{{*}} : its output stands beside the main one
            """
            + parts.READ.qkv_rows(first.attention, f"{layer}.attention", "blocks.{l}.attn.qkv")
            + linear_rows(f"{layer}.attention.o_proj", "blocks.{l}.attn.out")
            + parts.READ.mlp_rows(first.mlp, f"{layer}.mlp", "blocks.{l}.mlp", MLP)
        )

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        at = "vivit." if upstream.is_a(CLASSIFIER) else ""
        layer, block = f"{at}layers.{{l}}", "blocks.{l}"
        return HookMap.parse(
            f"""
                {at}embeddings.patch_embeddings   ->  hook_embed
                {at}embeddings                    ->  hook_full_embed
                {layer} : in                      ->  {block}.hook_resid_pre
                {layer}.layernorm_before          ->  {block}.ln1.hook_normalized
                {layer}.attention.q_proj          ->  {block}.attn.hook_q  : b p (h d) -> b p h d
                {layer}.attention.k_proj          ->  {block}.attn.hook_k  : b p (h d) -> b p h d
                {layer}.attention.v_proj          ->  {block}.attn.hook_v  : b p (h d) -> b p h d
                {layer}.attention @ softmax : in  ->  {block}.attn.hook_attn_scores
                {layer}.attention @ softmax       ->  {block}.attn.hook_pattern
                {layer}.attention.o_proj : in     ->  {block}.attn.hook_z  : b p (h d) -> b p h d
                {layer}.attention                 ->  {block}.hook_attn_out
                {layer}.layernorm_after : in      ->  {block}.hook_resid_mid
                {layer}.layernorm_after           ->  {block}.ln2.hook_normalized
                {layer}.mlp.fc1                   ->  {block}.mlp.hook_pre
                {layer}.mlp.fc2 : in              ->  {block}.mlp.hook_post
                {layer}.mlp                       ->  {block}.hook_mlp_out
                {layer}                           ->  {block}.hook_resid_post
                {at}layernorm                     ->  ln_final.hook_normalized
                {at}layernorm                     ->  hook_ln_final
                {"classifier : in" if at else "layernorm"}  ->  hook_pooled
                {"classifier" if at else "layernorm"}       ->  hook_logits
            """,
            h=spec.blocks[0].attn.n_heads,
        )


def _block(layer: Reader) -> BlockSpec:
    attn = layer.attention
    projections = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)
    return BlockSpec(
        attn=parts.attention(attn, attn.num_attention_heads, attn.head_dim, *projections),
        mlp=parts.READ.mlp(layer.mlp, MLP),
        ln1=parts.norm(layer.layernorm_before),
        ln2=parts.norm(layer.layernorm_after),
    )
