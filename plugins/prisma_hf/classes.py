"""The classes of transformers that are plain image encoders."""

from __future__ import annotations

from dataclasses import replace

from prisma_hf.names import BlockNames, ModelNames, TowerNames

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
    rope_of="picture",
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
JANUS = replace(
    CLIP,
    block=replace(CLIP_BLOCK, out="self_attn.projection_layer", absent=("self_attn.q_norm", "self_attn.k_norm")),
    prefix=(),
    last="@ getitem : in",
)


def _classifier(tower: TowerNames, at: str, **given: str) -> ModelNames:
    return ModelNames(tower, **{"at": at, "head": "classifier", "pool": "token", **given})  # type: ignore[arg-type]


def _pixels(tower: TowerNames, at: str) -> ModelNames:
    """Return the names of a class that predicts the pixels of each patch; it puts them together for squares alone."""
    return ModelNames(replace(tower, resize="never"), at=at, head="decoder.0", pool="patches")


MODELS: dict[str, ModelNames] = {
    f"transformers.models.{name}": names
    for name, names in {
        "vit.modeling_vit.ViTModel": ModelNames(VIT),
        "vit.modeling_vit.ViTForImageClassification": _classifier(VIT, "vit"),
        "deit.modeling_deit.DeiTModel": ModelNames(DEIT),
        "deit.modeling_deit.DeiTForImageClassification": _classifier(DEIT, "deit"),
        "deit.modeling_deit.DeiTForImageClassificationWithTeacher": _classifier(
            DEIT, "deit", head="cls_classifier", head_dist="distillation_classifier"
        ),
        "vit.modeling_vit.ViTForMaskedImageModeling": _pixels(VIT, "vit"),
        "deit.modeling_deit.DeiTForMaskedImageModeling": _pixels(DEIT, "deit"),
        "vit_mae.modeling_vit_mae.ViTMAEModel": ModelNames(VIT),
        "vit_msn.modeling_vit_msn.ViTMSNModel": ModelNames(VIT),
        "vit_msn.modeling_vit_msn.ViTMSNForImageClassification": _classifier(VIT, "vit"),
        "ijepa.modeling_ijepa.IJepaModel": ModelNames(IJEPA),
        "ijepa.modeling_ijepa.IJepaForImageClassification": _classifier(IJEPA, "ijepa", pool="avg_all"),
        "pixio.modeling_pixio.PixioModel": ModelNames(PIXIO),
        "beit.modeling_beit.BeitModel": ModelNames(BEIT),
        "beit.modeling_beit.BeitForImageClassification": _classifier(
            BEIT, "beit", pool="avg", ln_pool="beit.pooler.layernorm"
        ),
        "beit.modeling_beit.BeitForMaskedImageModeling": ModelNames(
            BEIT, at="beit", head="lm_head", pool="patches", ln_pool="layernorm"
        ),
        "data2vec.modeling_data2vec_vision.Data2VecVisionModel": ModelNames(DATA2VEC),
        "data2vec.modeling_data2vec_vision.Data2VecVisionForImageClassification": _classifier(
            DATA2VEC, "data2vec_vision", pool="avg", ln_pool="data2vec_vision.pooler.layernorm"
        ),
        "dpt.modeling_dpt.DPTModel": ModelNames(DPT),
        "vitpose_backbone.modeling_vitpose_backbone.VitPoseBackbone": ModelNames(VITPOSE),
        "flava.modeling_flava.FlavaImageModel": ModelNames(FLAVA),
        "blip.modeling_blip.BlipVisionModel": ModelNames(BLIP),
        "blip_2.modeling_blip_2.Blip2VisionModel": ModelNames(BLIP),
        "instructblip.modeling_instructblip.InstructBlipVisionModel": ModelNames(BLIP),
        "instructblipvideo.modeling_instructblipvideo.InstructBlipVideoVisionModel": ModelNames(BLIP),
        "idefics2.modeling_idefics2.Idefics2VisionTransformer": ModelNames(IDEFICS),
        "idefics3.modeling_idefics3.Idefics3VisionTransformer": ModelNames(IDEFICS),
        "smolvlm.modeling_smolvlm.SmolVLMVisionTransformer": ModelNames(IDEFICS),
        "phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalVisionModel": ModelNames(PHI),
        "granite_docling.modeling_granite_docling.GraniteDoclingVisionModel": ModelNames(GRANITE),
        "git.modeling_git.GitVisionModel": ModelNames(GIT, at="vision_model"),
        "kosmos2.modeling_kosmos2.Kosmos2VisionModel": ModelNames(KOSMOS, at="model"),
        "clipseg.modeling_clipseg.CLIPSegVisionModel": ModelNames(KOSMOS),
        "owlvit.modeling_owlvit.OwlViTVisionModel": ModelNames(OWL, at="vision_model"),
        "owlv2.modeling_owlv2.Owlv2VisionModel": ModelNames(OWL, at="vision_model"),
        "mlcd.modeling_mlcd.MLCDVisionModel": ModelNames(MLCD),
        "aimv2.modeling_aimv2.Aimv2VisionModel": ModelNames(AIM),
        "internvl.modeling_internvl.InternVLVisionModel": ModelNames(INTERN),
        "qianfan_ocr.modeling_qianfan_ocr.QianfanOCRVisionModel": ModelNames(replace(INTERN, blocks="layers")),
        "tipsv2.modeling_tipsv2.Tipsv2VisionModel": ModelNames(TIPS),
        "mgp_str.modeling_mgp_str.MgpstrModel": ModelNames(MGP),
        "janus.modeling_janus.JanusVisionModel": ModelNames(JANUS),
        "sapiens2.modeling_sapiens2.Sapiens2Model": ModelNames(SAPIENS),
        "bridgetower.modeling_bridgetower.BridgeTowerVisionModel": ModelNames(BRIDGE, at="visual"),
        "molmo2.modeling_molmo2.Molmo2VisionModel": ModelNames(MOLMO),
        "pixtral.modeling_pixtral.PixtralVisionModel": ModelNames(PIXTRAL),
    }.items()
}
