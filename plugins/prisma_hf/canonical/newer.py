"""Names of parts in the encoders of vision-language models, and in encoders with names of their own."""

from __future__ import annotations

from dataclasses import replace

from prisma_hf.canonical.names import BlockNames, TowerNames
from prisma_hf.canonical.towers import AIM, CLIP, CLIP_BLOCK, MASK, TIPS

MERGED = {
    f"{name}.{{*}}": "makes the language model's tokens, which stand beside the last hidden state"
    for name in ("merger", "merger_list", "deepstack_merger_list")
}
SAPIENS = TowerNames(
    replace(
        TIPS.block,
        heads="num_heads",
        fc1="mlp.up_proj",
        act="mlp.act_fn",
        fc2="mlp.down_proj",
        q_norm="attention.q_norm",
        k_norm="attention.k_norm",
        normed_apart=True,
        rot_q="@ cat#2",
        rot_k="@ cat#3",
    ),
    blocks="model.layer",
    proj="embeddings.patch_embeddings",
    image="config.image_size",
    prefix=TIPS.prefix,
    pos="",
    rope="rope_embeddings",
    rope_of="image",
    rope_sizes="radians",
    ln_final="norm",
    ignored=MASK,
)
PIXTRAL_BLOCK = BlockNames(
    attn="attention",
    scale="scaling",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.o_proj",
    ln1="attention_norm",
    ln2="ffn_norm",
    mlp="feed_forward",
)
PIXTRAL = TowerNames(
    PIXTRAL_BLOCK,
    blocks="transformer.layers",
    proj="patch_conv",
    packed="transformer",
    image="config.image_size",
    prefix=(),
    pos="",
    rope="patch_positional_embedding",
    rope_sizes="index",
    rope_apart=True,
    ln_pre="ln_pre",
    ln_final="",
)
MOLMO = TowerNames(
    replace(CLIP_BLOCK, width="head_dim", scale="scaling", out="self_attn.o_proj"),
    proj="patch_embedding",
    flat="p q c",
    patch="config.patch_size",
    image="config.image_size",
    prefix=(),
    pos="positional_embedding",
    ln_final="",
    resize="never",
)
QWEN_BLOCK = BlockNames(
    attn="attn",
    scale="scaling",
    q="",
    k="",
    v="",
    qkv="attn.qkv",
    out="attn.proj",
    ln1="norm1",
    ln2="norm2",
    fc1="mlp.linear_fc1",
    act="mlp.act_fn",
    fc2="mlp.linear_fc2",
    rot_q="@ split : in",
    rot_k="@ split#1 : in",
    axes="(batch p)",
)
QWEN = TowerNames(
    QWEN_BLOCK,
    blocks="blocks",
    proj="patch_embed.proj",
    listed="frames",
    image="",
    prefix=(),
    pos="pos_embed",
    resampler="",
    rope="rotary_pos_emb",
    rope_sizes="index",
    rope_in_float32=True,
    ln_final="",
    ignored=MERGED,
)
BRIDGE_BLOCK = BlockNames(
    attn="attn",
    scale="",
    mha=True,
    out="attn.out_proj",
    ln1="ln_1",
    ln2="ln_2",
    fc1="mlp.c_fc",
    act="mlp.gelu",
    fc2="mlp.c_proj",
    addend="attn",
    axes="p b",
)
BRIDGE = replace(
    CLIP,
    block=BRIDGE_BLOCK,
    blocks="transformer.resblocks",
    ln_pre="ln_pre",
    ln_final="ln_post",
    ln_each="ln_separate",
    refused={"transformer.stop_gradient": "streams handed over without their gradient"},
)
OVIS = replace(
    AIM,
    proj="embeddings.patch_embedding",
    image="embeddings.image_size",
    refused={},
    ignored={},
)
PADDLE = replace(
    CLIP,
    block=replace(CLIP_BLOCK, scale="scaling", rot_q="@ split : in", rot_k="@ split#1 : in", axes="(batch p)"),
    listed="patches",
    prefix=(),
    resampler="embeddings",
    rope="encoder.rotary_pos_emb",
    rope_sizes="index",
    rope_in_float32=True,
)
