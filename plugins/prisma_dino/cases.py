"""Conformance cases: every class, built small, with hyperparameters away from their defaults."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import transformers
from torch import nn

from prisma_core.plugin import Case

WIDTH, HEADS, PATCH = 24, 3, 4
V2: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "mlp_ratio": 2,
    "image_size": 3 * PATCH,
    "patch_size": PATCH,
    "layerscale_value": 0.7,
    "num_labels": 5,
    "drop_path_rate": 0.2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
V3: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": (2 * PATCH, 3 * PATCH),
    "patch_size": PATCH,
    "layerscale_value": 0.7,
    "num_register_tokens": 3,
    "rope_theta": 37.0,
    "drop_path_rate": 0.2,
    "attention_dropout": 0.1,
    "pos_embed_shift": 0.3,
    "pos_embed_jitter": 1.5,
}


def cases() -> Iterator[Case]:
    """Yield a case for every class and every choice of modules it is built of."""
    plain, registers = "Dinov2", "Dinov2WithRegisters"
    few, many = {"num_register_tokens": 2}, {"num_register_tokens": 3}
    swiglu = {"use_swiglu_ffn": True, "mlp_ratio": 3}
    every: dict[str, tuple[str, dict[str, Any]]] = {
        "dinov2": (f"{plain}Model", {}),
        "dinov2_swiglu": (f"{plain}Model", {**swiglu, "num_channels": 2}),
        "dinov2_no_qkv_bias": (f"{plain}Model", {"qkv_bias": False, "use_mask_token": False, "hidden_act": "gelu_new"}),
        "dinov2_classifier": (f"{plain}ForImageClassification", {"hidden_act": "quick_gelu"}),
        "dinov2_backbone": (f"{plain}Backbone", {"out_features": ["stage1", "stage2"]}),
        "dinov2_backbone_tokens": (f"{plain}Backbone", {"reshape_hidden_states": False, "apply_layernorm": False}),
        "dinov2_registers": (f"{registers}Model", many),
        "dinov2_registers_swiglu": (f"{registers}Model", {**few, **swiglu}),
        "dinov2_registers_classifier": (f"{registers}ForImageClassification", {**few, "hidden_act": "relu"}),
        "dinov2_registers_backbone": (f"{registers}Backbone", {**few, "apply_layernorm": False}),
    }
    for name, (kind, options) in every.items():
        config = f"{registers if kind.startswith(registers) else plain}Config"
        yield Case(name, build=partial(build, kind, config, {**V2, **options}))
    v3: dict[str, tuple[str, dict[str, Any]]] = {
        "dinov3": ("DINOv3ViTModel", {}),
        "dinov3_gated": ("DINOv3ViTModel", {"use_gated_mlp": True, "hidden_act": "silu", "mlp_bias": False}),
        "dinov3_every_bias": ("DINOv3ViTModel", {"key_bias": True, "proj_bias": False, "num_register_tokens": 0}),
        "dinov3_no_qkv_bias": ("DINOv3ViTModel", {"query_bias": False, "value_bias": False, "hidden_act": "gelu_fast"}),
        "dinov3_backbone": ("DINOv3ViTBackbone", {"out_features": ["stem", "stage2"], "apply_layernorm": False}),
        "dinov3_backbone_tokens": ("DINOv3ViTBackbone", {"reshape_hidden_states": False}),
    }
    for name, (kind, options) in v3.items():
        yield Case(name, build=partial(build, kind, "DINOv3ViTConfig", {**V3, **options}))


def build(kind: str, config: str, options: dict[str, Any]) -> nn.Module:
    """Return a model of one of transformers' classes."""
    return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
