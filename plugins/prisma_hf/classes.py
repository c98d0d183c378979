"""The classes of transformers that are plain image encoders."""

from __future__ import annotations

from dataclasses import replace

from prisma_hf.names import BlockNames, ModelNames, TowerNames

POOLER = {"pooler.{*}": "its output stands beside the last hidden state, which is the main output"}
MASK = {"embeddings.mask_token": "stands for patches that the caller hides"}

VIT_BLOCK = BlockNames(
    attn="attention",
    heads="num_attention_heads",
    scale="scaling",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.o_proj",
    ln1="layernorm_before",
    ln2="layernorm_after",
)
VIT = TowerNames(block=VIT_BLOCK, ignored={**POOLER, **MASK})

MODELS: dict[str, ModelNames] = {
    "transformers.models.vit.modeling_vit.ViTModel": ModelNames(VIT),
    "transformers.models.vit.modeling_vit.ViTForImageClassification": ModelNames(
        VIT, at="vit", head="classifier", pool="token"
    ),
}
