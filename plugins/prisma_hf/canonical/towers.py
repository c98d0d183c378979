"""Names of parts in the encoders named as ViT's, BERT's and CLIP's."""

from __future__ import annotations

from dataclasses import replace

from prisma_hf.canonical.names import BlockNames, TowerNames

POOLER = {"pooler.{*}": "its output stands beside the last hidden state, which is the main output"}
MASK = {"embeddings.mask_token": "stands for patches that the caller hides"}
HEAD = {"head.{*}": "its output stands beside the last hidden state, which is the main output"}

# ---- ViT's own names, and those of the models that came to share them

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
VIT = TowerNames(VIT_BLOCK, ignored={**POOLER, **MASK})
TIPS = replace(
    VIT,
    block=replace(
        VIT_BLOCK,
        ln1="norm1",
        ln2="norm2",
        ls1="layer_scale1.lambda1",
        ls2="layer_scale2.lambda1",
        attn_out="layer_scale1",
        mlp_out="layer_scale2",
    ),
    blocks="encoder.layer",
    prefix=(("cls", "embeddings.cls_token"), ("registers", "embeddings.register_tokens")),
    pos_without_registers=True,
    side="config.patch_size",
    resize="always",
    mode="bilinear",
    antialias=True,
    resize_float32=True,
    ignored=MASK,
)
DEIT = replace(VIT, prefix=(("cls", "embeddings.cls_token"), ("distillation", "embeddings.distillation_token")))
IJEPA = replace(VIT, prefix=())
PIXIO = replace(VIT, resize="always", resize_float32=True)
BEIT = replace(
    VIT,
    block=replace(
        VIT_BLOCK, ls1="lambda_1", ls2="lambda_2", attn_out="@ mul", mlp_out="@ mul#1", bias="relative_position_bias"
    ),
    resize="always",
    bias="shared_position_bias",
)

# ---- names of BERT's time

BERT_BLOCK = BlockNames(
    attn="attention.attention",
    heads="num_attention_heads",
    scale="",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    ln1="layernorm_before",
    ln2="layernorm_after",
    fc1="intermediate.dense",
    act="intermediate.intermediate_act_fn",
    fc2="output.dense",
)
FLAVA = TowerNames(BERT_BLOCK, blocks="encoder.layer", ignored={**POOLER, **MASK})
DPT = TowerNames(
    replace(BERT_BLOCK, scale="scaling"),
    blocks="encoder.layer",
    side="config.patch_size",
    resize="always",
    mode="bilinear",
    ignored=POOLER,
)
VITPOSE = TowerNames(
    replace(BERT_BLOCK, scale="scaling", fc1="mlp.fc1", act="mlp.activation", fc2="mlp.fc2", single="num_experts"),
    blocks="encoder.layer",
    stem="embeddings.patch_embeddings",
    prefix=(),
    pos_and_first=True,
    resize="never",
)
DATA2VEC = TowerNames(
    replace(
        BERT_BLOCK,
        ls1="lambda_1",
        ls2="lambda_2",
        attn_out="@ mul",
        mlp_out="@ mul#1",
        bias="attention.attention.relative_position_bias",
    ),
    blocks="encoder.layer",
    resize="always",
    bias="encoder.relative_position_bias",
    ignored={**POOLER, **MASK},
)

# ---- CLIP's names

CLIP_BLOCK = BlockNames()
CLIP = TowerNames(
    CLIP_BLOCK,
    blocks="encoder.layers",
    proj="embeddings.patch_embedding",
    image="embeddings.image_size",
    prefix=(("cls", "embeddings.class_embedding"),),
    pos="embeddings.position_embedding",
    ln_final="post_layernorm",
)
BLIP = replace(
    CLIP,
    block=replace(CLIP_BLOCK, q="", k="", v="", qkv="self_attn.qkv", out="self_attn.projection"),
    last="@ getitem : in",
)
IDEFICS = replace(CLIP, prefix=(), resize="never", looked_up=True)
PHI = replace(IDEFICS, block=replace(CLIP_BLOCK, scale="scaling"), image="config.image_size", ignored=HEAD)
GRANITE = replace(
    IDEFICS, looked_up=False, ignored={"connector.{*}": "makes the language model's tokens of the output"}
)
GIT = replace(CLIP, ln_pre="pre_layrnorm")
LATE = {"post_layernorm.{*}": "of the class token, which stands beside the last hidden state"}
KOSMOS = replace(GIT, ln_final="", ignored=LATE)
OWL = replace(KOSMOS, ln_pre="pre_layernorm", image="embeddings.config.image_size")
MLCD = replace(
    KOSMOS,
    block=replace(CLIP_BLOCK, addend="self_attn", out_axes="p b"),
    pos="",
    rope="vision_rotary_embedding",
    rope_cls="class_pos_emb",
    rope_in_float32=True,
)
AIM_BLOCK = replace(
    CLIP_BLOCK,
    attn="attention",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.out_proj",
    ln1="rms_norm1",
    ln2="rms_norm2",
    mlp="ffn",
)
AIM = TowerNames(
    AIM_BLOCK,
    blocks="encoder.layers",
    proj="embeddings.patch_embed",
    image="config.image_size",
    prefix=(),
    embed_norm="embeddings.rms_norm",
    pos="embeddings.position_embedding",
    ln_final="rms_norm",
    resize="never",
    ignored=HEAD,
    refused={"config.is_native": "positions made for each image as it comes"},
)
INTERN_BLOCK = replace(
    BEIT.block,
    heads="num_heads",
    scale="scale",
    out="attention.projection_layer",
    bias="",
    q_norm="attention.q_norm",
    k_norm="attention.k_norm",
)
INTERN = replace(BEIT, block=INTERN_BLOCK, blocks="encoder.layer", bias="", side="")
MGP_BLOCK = BlockNames(
    attn="attn", q="", k="", v="", qkv="attn.qkv", out="attn.proj", ln1="norm1", ln2="norm2", act="mlp.act"
)
MGP = TowerNames(
    MGP_BLOCK,
    blocks="encoder.blocks",
    proj="embeddings.proj",
    image="embeddings.image_size",
    pos="embeddings.pos_embed",
    ln_final="",
    resize="never",
)
JANUS = replace(
    CLIP,
    block=replace(CLIP_BLOCK, out="self_attn.projection_layer", absent=("self_attn.q_norm", "self_attn.k_norm")),
    prefix=(),
    last="@ getitem : in",
)
