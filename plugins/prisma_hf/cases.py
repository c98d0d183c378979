"""Conformance cases: every class that an adapter takes, small and away from its defaults."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from prisma_core.plugin import Case, Images
from prisma_hf.canonical.classes import MODELS
from prisma_hf.images import images
from prisma_hf.mae import InOrder

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 8,
    "num_channels": 2,
    "layer_norm_eps": 3e-5,
    "hidden_act": "gelu_new",
}
CLASSES = {"num_labels": 5}


# The processor that transformers gives each kind of model: once for each way to resize and cut, and one that is called.
PROCESSORS = {
    "ViTModel": "ViTImageProcessor",
    "DeiTModel": "DeiTImageProcessor",
    "BeitForImageClassification": "BeitImageProcessor",
    "MLCDVisionModel": "CLIPImageProcessor",
    "Owlv2VisionModel": "Owlv2ImageProcessor",
}


def processed(name: str, upstream: nn.Module) -> Images:
    """Return our preprocessing and that of one of transformers' image processors, as it comes."""
    import transformers

    return images(getattr(transformers, name)())


def built(name: str, *, whole: str = "", at: str = "", **given: Any) -> nn.Module:
    """Return a small model of one of the classes.

    Args:
        whole, at: the class that makes it, and where it stands there, if it comes in another alone.
    """
    path = next(path for path in MODELS if path.endswith(f".{name}"))
    module, _, _ = path.rpartition(".")
    kind = getattr(importlib.import_module(module), whole or name)
    return kind(kind.config_class(**{**SMALL, **given})).get_submodule(at)


def autoencoder() -> nn.Module:
    """Return a small masked autoencoder that hides the last patches."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    decoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
    settings = {**SMALL, **{f"decoder_{name}": value for name, value in decoder.items()}, "mask_ratio": 0.5}
    return InOrder(ViTMAEForPreTraining(ViTMAEConfig(**settings)))


def case(name: str, variant: str = "", **given: Any) -> Case:
    """Return the case of a class with a small config."""
    title = f"{name}{'.' if variant else ''}{variant}"
    processor = PROCESSORS.get(name) if not variant else None
    return Case(
        title,
        partial(built, name, **given),
        images=partial(processed, processor) if processor else None,
    )


def cases() -> Iterator[Case]:
    """Yield a case for every class, and more for what a class may or may not have."""
    flat = {"use_mean_pooling": False, "layer_scale_init_value": 0.0}
    wide = {"image_size": (16, 24)}
    yield case("ViTModel")
    yield case("ViTForImageClassification", qkv_bias=False, **wide, **CLASSES)
    yield case("DeiTModel", hidden_act="quick_gelu", **wide)
    yield case("DeiTForImageClassification", **CLASSES)
    yield case("DeiTForImageClassificationWithTeacher", qkv_bias=False, **CLASSES)
    yield case("ViTForMaskedImageModeling", encoder_stride=4)
    yield case("DeiTForMaskedImageModeling", encoder_stride=8)
    yield case("BeitForMaskedImageModeling", vocab_size=11, use_mask_token=True, **flat)
    yield case("BeitForMaskedImageModeling", "tables", vocab_size=11, use_relative_position_bias=True)
    yield case("ViTMAEModel", mask_ratio=0.0)
    yield Case("ViTMAEForPreTraining", autoencoder)
    yield case("ViTMSNModel")
    yield case("ViTMSNForImageClassification", **wide, **CLASSES)
    yield case("IJepaModel")
    yield case("IJepaForImageClassification", hidden_act="silu", **CLASSES)
    yield case("PixioModel", n_cls_tokens=3)
    tables = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
    for model in ("Beit", "Data2VecVision"):
        yield case(f"{model}Model", use_absolute_position_embeddings=True, **flat)
        yield case(f"{model}Model", "tables", **tables, image_size=(16, 24), use_mask_token=True)
        yield case(f"{model}ForImageClassification", use_relative_position_bias=True, **CLASSES)
        yield case(f"{model}ForImageClassification", "first_token", **flat, **CLASSES)
    yield case("DPTModel", qkv_bias=False, is_hybrid=False)
    yield case("VitPoseBackbone", mlp_ratio=2, qkv_bias=False, image_size=(16, 24), patch_size=(8, 8))
    yield case("FlavaImageModel", **wide)
    for name in ("Blip", "Blip2", "InstructBlip", "InstructBlipVideo"):
        yield case(f"{name}VisionModel", num_channels=3)
    for name in ("Idefics2", "Idefics3", "SmolVLM"):
        yield case(f"{name}VisionTransformer")
    yield case("JanusVisionModel", use_qk_norm=False, attention_bias=False)
    yield case("GraniteDoclingVisionModel", num_channels=3, deepstack_visual_indexes=[0], scale_factor=2, image_size=32)
    for name in ("Git", "Kosmos2", "CLIPSeg", "OwlViT", "Owlv2"):
        yield case(f"{name}VisionModel", hidden_act="quick_gelu")
    yield case("MLCDVisionModel")
    yield case("Aimv2VisionModel", hidden_act="silu", is_native=False, use_head=False, rms_norm_eps=3e-5)
    yield case("Aimv2VisionModel", "head", qkv_bias=True, mlp_bias=True, is_native=False, use_head=True)
    patches = {"image_size": (24, 24), "patch_size": (8, 8)}
    for name in ("InternVL", "QianfanOCR"):
        yield case(f"{name}VisionModel", layer_scale_init_value=0.3, **patches)
        settings = {"norm_type": "rms_norm", "use_qk_norm": True, "use_mean_pooling": False, "attention_bias": True}
        yield case(f"{name}VisionModel", "rms", layer_scale_init_value=0.3, **patches, **settings)
    yield case("Tipsv2VisionModel", num_register_tokens=2, mlp_ratio=2)
    yield case("Tipsv2VisionModel", "gated", num_register_tokens=2, mlp_ratio=2, use_swiglu_ffn=True)
    yield case("MgpstrModel", distilled=False, image_size=(16, 24), mlp_ratio=1.5)
    turned = {"hidden_size": 32, "num_attention_heads": 4, "image_size": [24, 16]}
    settings = {"rope_theta": 30.0, "rms_norm_eps": 3e-5, **turned}
    yield case("Sapiens2Model", num_key_value_heads_per_layer=[4, 2], num_register_tokens=2, **settings)
    bare = {"use_gated_mlp": False, "use_qk_norm": False, "query_bias": False, "key_bias": False, "mlp_bias": False}
    few = {"num_key_value_heads_per_layer": [1, 4], "num_register_tokens": 0, "use_mask_token": True}
    yield case("Sapiens2Model", "bare", **bare, **few, **settings)
    yield case("PixtralVisionModel", rope_parameters={"rope_type": "axial", "rope_theta": 30.0}, **turned)
    yield case("Molmo2VisionModel", num_key_value_heads=3, head_dim=6, image_size=[24, 16])
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": False}
    yield case("Molmo2VisionModel", "grouped", **grouped, image_size=[16, 24])
    ovis = {"whole": "Ovis2VisionModel", "at": "transformer", "qkv_bias": True, "rms_norm_eps": 3e-5}
    yield case("Ovis2VisionTransformer", **ovis)
    for name in ("PaddleOCRVisionTransformer", "PaddleOCRVisionModel"):
        yield case(name, rope_parameters={"rope_type": "axial", "rope_theta": 30.0})
    listed = {"in_channels": 2, "patch_size": 4, "num_position_embeddings": 16, "out_hidden_size": 20}
    listed |= {"rope_parameters": {"rope_type": "axial", "rope_theta": 30.0}, "spatial_merge_size": 1}
    for name in ("Qwen3VLVisionModel", "Qwen3VLMoeVisionModel", "Qwen3OmniMoeVisionEncoder"):
        yield case(name, deepstack_visual_indexes=[0], **listed)
    yield case("CohereCompassVisionModel", deepstack_visual_indexes=[1], temporal_patch_size=3, **listed)
    for name in ("Qwen3_5VisionModel", "Qwen3_5MoeVisionModel", "Qwen4ExpVisionModel"):
        yield case(name, **listed)
    yield case("BridgeTowerVisionModel", hidden_size=128)
    each = {"share_layernorm": False, "remove_last_layer": True, "num_hidden_layers": 3}
    yield case("BridgeTowerVisionModel", "each", hidden_size=128, **each)
