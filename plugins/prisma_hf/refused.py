"""Image models of transformers that no adapter takes: the unsupported feature, and what there is instead."""

from __future__ import annotations

from prisma_core.plugin import Refusal

FEATURES = {
    "packed patches with positions resampled for each image": (
        "cosmos3_edge.modeling_cosmos3_edge.Cosmos3EdgeVisionModel",
        "glm_image.modeling_glm_image.GlmImageVisionModel",
        "hunyuan_vl.modeling_hunyuan_vl.HunYuanVLVisionTransformer",
    ),
    "two transformers in a row": (
        "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2VisionModel",
        "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrVisionModel",
    ),
    "packed patches with no native size of image": (
        "dots3_note.modeling_dots3_note.Dots3NoteVisionModel",
        "ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        "qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        "video_llama_3.modeling_video_llama_3.VideoLlama3VisionModel",
    ),
    "attention in windows": (
        "exaone4_5.modeling_exaone4_5.Exaone4_5_VisionModel",
        "hyperclovax_vision_v2.modeling_hyperclovax_vision_v2.HyperCLOVAXVisionV2Model",
        "inkling2.modeling_inkling2.Inkling2VisionModel",
        "lw_detr.modeling_lw_detr.LwDetrViTBackbone",
        "muse_glimmer.modeling_muse_glimmer.MuseGlimmerVisionModel",
        "muse_spark.modeling_muse_spark.MuseSparkVisionModel",
        "qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniVisionEncoder",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        "rf_detr.modeling_rf_detr.RfDetrDinov2Backbone",
        "sam3.modeling_sam3.Sam3ViTModel",
    ),
    "sandwich norms": ("gemma4.modeling_gemma4.Gemma4VisionModel",),
    "a projector behind the encoder": (
        "glm4v_moe.modeling_glm4v_moe.Glm4vMoeVisionModel",
        "glm4v.modeling_glm4v.Glm4vVisionModel",
        "glm5_next.modeling_glm5_next.Glm5NextVisionModel",
        "glm_ocr.modeling_glm_ocr.GlmOcrVisionModel",
        "step3p7.modeling_step3p7.Step3p7VisionModel",
    ),
    "relative positions that depend on the query": (
        "got_ocr2.modeling_got_ocr2.GotOcr2VisionEncoder",
        "pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionModel",
        "slanext.modeling_slanext.SLANeXtVisionEncoder",
        "sam_hq.modeling_sam_hq.SamHQVisionModel",
        "sam.modeling_sam.SamVisionModel",
        "seggpt.modeling_seggpt.SegGptModel",
        "vitdet.modeling_vitdet.VitDetModel",
    ),
    "tokens grouped between blocks": ("groupvit.modeling_groupvit.GroupViTVisionModel",),
    "packed patches with positions of frames as well": ("kimi_k25.modeling_kimi_k25.Kimi_K25VisionModel",),
    "packed patches that bring their row and column along": (
        "kosmos2_5.modeling_kosmos2_5.Kosmos2_5VisionModel",
        "pix2struct.modeling_pix2struct.Pix2StructVisionModel",
    ),
    "tokens behind the patches": (
        "llama4.modeling_llama4.Llama4VisionModel",
        "yolos.modeling_yolos.YolosModel",
    ),
    "heads that read characters": ("mgp_str.modeling_mgp_str.MgpstrForSceneTextRecognition",),
    "tokens merged between blocks": (
        "minicpm_ocr.modeling_minicpm_ocr.MiniCPMOcrVisionModel",
        "minicpmv4_6.modeling_minicpmv4_6.MiniCPMV4_6VisionModel",
        "minicpmv4_7.modeling_minicpmv4_7.MiniCPMV4_7VisionModel",
    ),
    "packed patches turned by frame as well": ("minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLVisionModel",),
    "gated residuals and tiles": ("mllama.modeling_mllama.MllamaVisionModel",),
    "a visual vocabulary as head": ("ovis2.modeling_ovis2.Ovis2VisionModel",),
    "pixels normed in float32 inside and positions resampled for each image": ("radio.modeling_radio.RadioModel",),
    "tokens passed between frames": ("x_clip.modeling_x_clip.XCLIPVisionModel",),
}
INSTEAD = {  # families that timm has as well, where they are hooked upstreams: feature, reference, classes
    ("relative positions that depend on the query", "timm:samvit_base_patch16"): (
        "sam.modeling_sam.SamModel",
        "sam.modeling_sam.SamVisionModel",
        "sam.modeling_sam.SamVisionEncoder",
    ),
    ("attention in windows", "timm:swin_tiny_patch4_window7_224"): (
        "swin.modeling_swin.SwinModel",
        "swin.modeling_swin.SwinForImageClassification",
        "swin.modeling_swin.SwinForMaskedImageModeling",
        "swin.modeling_swin.SwinBackbone",
    ),
    ("attention in windows", "timm:swinv2_tiny_window8_256"): (
        "swinv2.modeling_swinv2.Swinv2Model",
        "swinv2.modeling_swinv2.Swinv2ForImageClassification",
        "swinv2.modeling_swinv2.Swinv2ForMaskedImageModeling",
        "swinv2.modeling_swinv2.Swinv2Backbone",
    ),
    ("queries pooled between blocks", "timm:hiera_tiny_224"): (
        "hiera.modeling_hiera.HieraModel",
        "hiera.modeling_hiera.HieraForImageClassification",
        "hiera.modeling_hiera.HieraForPreTraining",
        "hiera.modeling_hiera.HieraBackbone",
    ),
    ("convolutions in place of attention", "timm:convnext_tiny"): (
        "convnext.modeling_convnext.ConvNextModel",
        "convnext.modeling_convnext.ConvNextForImageClassification",
        "convnext.modeling_convnext.ConvNextBackbone",
    ),
    ("convolutions in place of attention", "timm:convnextv2_tiny"): (
        "convnextv2.modeling_convnextv2.ConvNextV2Model",
        "convnextv2.modeling_convnextv2.ConvNextV2ForImageClassification",
        "convnextv2.modeling_convnextv2.ConvNextV2Backbone",
    ),
}


def refusals() -> list[Refusal]:
    """Return one for each feature; classes with something instead have their own."""
    elsewhere = {name for names in INSTEAD.values() for name in names}
    plain = {
        f"{feature}; a hook map of your own can hook it (docs/how-to-other-architectures.md)": tuple(
            name for name in names if name not in elsewhere
        )
        for feature, names in FEATURES.items()
    }
    instead = {
        f"{feature}; timm's model of this family is a hooked upstream, such as prisma.load('{reference}')": names
        for (feature, reference), names in INSTEAD.items()
    }
    return [
        Refusal(tuple(f"transformers.models.{name}" for name in names), feature)
        for feature, names in {**plain, **instead}.items()
    ]
