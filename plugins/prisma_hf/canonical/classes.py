"""The classes of transformers that are plain image encoders."""

from __future__ import annotations

from dataclasses import replace

from prisma_hf.canonical import calling
from prisma_hf.canonical.names import ModelNames, TowerNames
from prisma_hf.canonical.newer import BRIDGE, MOLMO, OVIS, PADDLE, PIXTRAL, QWEN, SAPIENS
from prisma_hf.canonical.towers import (
    AIM,
    BEIT,
    BLIP,
    DATA2VEC,
    DEIT,
    DPT,
    FLAVA,
    GIT,
    GRANITE,
    IDEFICS,
    IJEPA,
    INTERN,
    JANUS,
    KOSMOS,
    MGP,
    MLCD,
    OWL,
    PHI,
    PIXIO,
    TIPS,
    VIT,
    VITPOSE,
)


def _classifier(tower: TowerNames, at: str, **given: str) -> ModelNames:
    return ModelNames(tower, **{"at": at, "head": "classifier", "pool": "token", **given})  # type: ignore[arg-type]


def _pixels(tower: TowerNames, at: str) -> ModelNames:
    """Return the names of a class that predicts the pixels of each patch; it puts them together for squares alone."""
    return ModelNames(replace(tower, resize="never"), at=at, head="decoder.0", pool="patches", call=calling.pixels)


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
        "vit_mae.modeling_vit_mae.ViTMAEModel": ModelNames(VIT, call=calling.unmasked),
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
        "vitpose_backbone.modeling_vitpose_backbone.VitPoseBackbone": ModelNames(VITPOSE, call=calling.last_map),
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
        "git.modeling_git.GitVisionModel": ModelNames(GIT, at="vision_model", call=calling.unrounded),
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
        "bridgetower.modeling_bridgetower.BridgeTowerVisionModel": ModelNames(
            BRIDGE, at="visual", call=calling.last_stream
        ),
        "molmo2.modeling_molmo2.Molmo2VisionModel": ModelNames(MOLMO, call=calling.patch_by_patch),
        "pixtral.modeling_pixtral.PixtralVisionModel": ModelNames(PIXTRAL, call=calling.packed),
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel": ModelNames(QWEN),
        "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel": ModelNames(QWEN),
        "qwen3_5.modeling_qwen3_5.Qwen3_5VisionModel": ModelNames(QWEN),
        "qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionModel": ModelNames(QWEN),
        "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionEncoder": ModelNames(QWEN),
        "qwen4_exp.modeling_qwen4_exp.Qwen4ExpVisionModel": ModelNames(QWEN),
        "ovis2.modeling_ovis2.Ovis2VisionTransformer": ModelNames(OVIS),
        "paddleocr_vl.modeling_paddleocr_vl.PaddleOCRVisionTransformer": ModelNames(PADDLE),
        "paddleocr_vl.modeling_paddleocr_vl.PaddleOCRVisionModel": ModelNames(PADDLE, at="vision_model"),
        "cohere_compass.modeling_cohere_compass.CohereCompassVisionModel": ModelNames(QWEN),
    }.items()
}
