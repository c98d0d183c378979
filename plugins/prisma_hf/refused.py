"""transformers' image encoders that the canonical transformer cannot represent, and why."""

from __future__ import annotations

from typing import NoReturn

from prisma_core.adapter import Adapter, Reader, qualified_name
from prisma_core.hookmap import HookMap
from prisma_core.spec import ModelSpec
from prisma_core.weights import WeightMap

REASONS: dict[str, tuple[str, ...]] = {
    "not adapted: its attention is torch's own module": ("bridgetower.modeling_bridgetower.BridgeTowerVisionModel",),
    "not adapted: its pictures are packed into one row of tokens": ("pixtral.modeling_pixtral.PixtralVisionModel",),
    "not adapted: it conditions pictures and cuts positions at random": ("radio.modeling_radio.RadioModel",),
    "not adapted: its rotary positions and groups of heads": ("sapiens2.modeling_sapiens2.Sapiens2Model",),
    "a projector behind the encoder": (
        "cohere_compass.modeling_cohere_compass.CohereCompassVisionModel",
        "dots3_note.modeling_dots3_note.Dots3NoteVisionModel",
        "glm4v.modeling_glm4v.Glm4vVisionModel",
        "glm4v_moe.modeling_glm4v_moe.Glm4vMoeVisionModel",
        "glm5_next.modeling_glm5_next.Glm5NextVisionModel",
        "glm_ocr.modeling_glm_ocr.GlmOcrVisionModel",
        "hunyuan_vl.modeling_hunyuan_vl.HunYuanVLVisionTransformer",
        "qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        "qwen3_5.modeling_qwen3_5.Qwen3_5VisionModel",
        "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionModel",
        "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionEncoder",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
        "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel",
        "qwen4_exp.modeling_qwen4_exp.Qwen4ExpVisionModel",
        "step3p7.modeling_step3p7.Step3p7VisionModel",
    ),
    "packed patches": (
        "cosmos3_edge.modeling_cosmos3_edge.Cosmos3EdgeVisionModel",
        "ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel",
        "glm_image.modeling_glm_image.GlmImageVisionModel",
        "kimi_k25.modeling_kimi_k25.Kimi_K25VisionModel",
        "kosmos2_5.modeling_kosmos2_5.Kosmos2_5VisionModel",
        "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLVisionModel",
        "molmo2.modeling_molmo2.Molmo2VisionModel",
        "paddleocr_vl.modeling_paddleocr_vl.PaddleOCRVisionTransformer",
        "pix2struct.modeling_pix2struct.Pix2StructVisionModel",
        "video_llama_3.modeling_video_llama_3.VideoLlama3VisionModel",
    ),
    "two transformers in a row": (
        "deepseek_ocr2.modeling_deepseek_ocr2.DeepseekOcr2VisionModel",
        "unlimited_ocr.modeling_unlimited_ocr.UnlimitedOcrVisionModel",
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
    "relative positions that depend on the query": (
        "got_ocr2.modeling_got_ocr2.GotOcr2VisionEncoder",
        "pp_formulanet.modeling_pp_formulanet.PPFormulaNetVisionModel",
        "sam.modeling_sam.SamVisionModel",
        "sam_hq.modeling_sam_hq.SamHQVisionModel",
        "seggpt.modeling_seggpt.SegGptModel",
        "slanext.modeling_slanext.SLANeXtVisionEncoder",
        "vitdet.modeling_vitdet.VitDetModel",
    ),
    "tokens grouped between blocks": ("groupvit.modeling_groupvit.GroupViTVisionModel",),
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
    "gated residuals and tiles": ("mllama.modeling_mllama.MllamaVisionModel",),
    "a visual vocabulary as head": ("ovis2.modeling_ovis2.Ovis2VisionModel",),
    "tokens passed between frames": ("x_clip.modeling_x_clip.XCLIPVisionModel",),
}
REFUSED = {f"transformers.models.{path}": reason for reason, paths in REASONS.items() for path in paths}


class RefusedAdapter(Adapter):
    """Encoders with something in them that would change their numbers if it were left out."""

    types = tuple(REFUSED)

    def spec(self, upstream: Reader) -> ModelSpec:
        _refuse(upstream)

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        _refuse(upstream)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        _refuse(upstream)


def _refuse(upstream: Reader) -> NoReturn:
    raise upstream.unsupported(REFUSED[qualified_name(upstream.module)])
