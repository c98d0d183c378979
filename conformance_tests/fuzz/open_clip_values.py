"""Fields of open_clip's configurations and factory, other values for each, and the models on which they are moved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

open_clip = pytest.importorskip("open_clip", reason="open_clip is missing: pip install 'prisma-interp[clip]'")
pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[clip]'")
pytest.importorskip("prisma_timm", reason="the plugin for timm's towers is not installed")

from open_clip.coca_model import CoCa  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402

Config = dict[str, Any]
Fields = dict[str, tuple[Any, ...]]

BLOCKS: Fields = {
    "mlp_ratio": (1.6,),
    "ls_init_value": (0.1,),
    "act_kwargs": ({}, {"approximate": "tanh"}),
    "norm_kwargs": ({"eps": 1e-2}, {"bias": False}, {"elementwise_affine": False}),
    "block_type": ("default", "custom"),
    "qk_norm": (True,),
    "scaled_cosine_attn": (True,),
    "scale_heads": (True,),
    "scale_attn_inner": (True,),
    "scale_attn": (True,),
    "scale_fc": (True,),
}
VISION: Fields = {
    **BLOCKS,
    "layers": (2, (1, 1, 1, 1)),
    "width": (48,),
    "head_width": (12, 20),
    "patch_size": (8, (16, 8)),
    "image_size": (48, (32, 64), 40),
    "patch_dropout": (0.5,),
    "attentional_pool": (True, "parallel", "cascade"),
    "attn_pooler_queries": (3,),
    "attn_pooler_heads": (2,),
    "no_ln_pre": (True,),
    "pos_embed_type": ("sin_cos_2d", "none"),
    "final_ln_after_pool": (True,),
    "pool_type": ("tok", "avg", "none"),
    "output_tokens": (True, False),
    "timm_model_name": ("test_vit2", "test_vit3", "test_convnext"),
    "timm_model_pretrained": (False,),
    "timm_pool": ("token", "", "avgmax", "abs_attn", "rot_attn", "map"),
    "timm_proj": ("mlp", "none", ""),
    "timm_proj_bias": (True,),
    "timm_drop": (0.5,),
    "timm_drop_path": (0.5,),
}
TEXT: Fields = {
    **BLOCKS,
    "context_length": (5,),
    "vocab_size": (31,),
    "hf_tokenizer_name": ("any/other",),
    "tokenizer_mode": ("clips",),
    "tokenizer_kwargs": ({"clean": "canonicalize"},),
    "width": (16, 24),
    "heads": (4,),
    "layers": (2,),
    "embed_cls": (True,),
    "pad_id": (7,),
    "eos_id": (9,),
    "no_causal_mask": (True,),
    "final_ln_after_pool": (True,),
    "pool_type": ("first", "last", "argmax", "eos", "none"),
    "proj_bias": (True,),
    "proj_type": ("none",),
    "output_tokens": (True, False),
    "hf_model_name": ("xlm-roberta", "bert", "mt5"),
    "hf_model_pretrained": (True,),
    "hf_proj_type": ("linear", None),
    "hf_pooler_type": ("max_pooler", "cls_pooler", "cls_last_hidden_state_pooler", None),
}
CAPTIONS: Fields = {**TEXT, "dim_head": (32,), "n_queries": (3,), "attn_pooler_heads": (2,)}
WHOLE: Fields = {
    "embed_dim": (16,),
    "quick_gelu": (True,),
    "init_logit_scale": (1.5,),
    "init_logit_bias": (-3.0,),
    "nonscalar_logit_scale": (True,),
    "cast_dtype": (torch.float16, torch.bfloat16),
    "output_dict": (True,),
    "pad_id": (7,),
}
FACTORY: Fields = {
    "custom_text": (True,),  # of the configuration, read by the factory alone
    "force_quick_gelu": (True,),
    "force_custom_text": (True,),
    "force_patch_dropout": (0.5,),
    "force_image_size": (48, (32, 64)),
    "force_context_length": (5,),
    "force_preprocess_cfg": ({"mean": (0.1, 0.2, 0.3)},),
    "precision": ("bf16", "pure_fp16", "fp64"),
    "output_dict": (True,),
    "jit": (True,),
}

# -------------------------------------------------------------------- the models

SEEN: Config = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16, "attn_pooler_heads": 4}
READ: Config = {"context_length": 7, "vocab_size": 41, "width": 32, "heads": 2, "layers": 1}
TIMM: Config = {"timm_model_name": "test_vit", "image_size": 160}
POOLED: Config = {"attentional_pool": True, "attn_pooler_queries": 5}
WRITES: Config = {"context_length": 7, "vocab_size": 41, "width": 12, "heads": 2, "layers": 1}
BASES: dict[str, tuple[type[nn.Module], Config]] = {
    "native": (CLIP, {"vision_cfg": SEEN | {"pool_type": "avg"}, "text_cfg": READ}),
    "custom": (CustomTextCLIP, {"vision_cfg": SEEN | POOLED, "text_cfg": READ | {"pool_type": "eos"}}),
    "timm": (CustomTextCLIP, {"embed_dim": 64, "vision_cfg": TIMM, "text_cfg": READ}),
    "bert": (CustomTextCLIP, {"vision_cfg": SEEN, "text_cfg": {"hf_model_name": "roberta", "context_length": 7}}),
    "coca": (
        CoCa,
        {
            "vision_cfg": SEEN | POOLED | {"output_tokens": True},
            "text_cfg": READ | {"embed_cls": True, "output_tokens": True},
            "multimodal_cfg": WRITES,
        },
    ),
}
MOVED = {"native": "vw", "custom": "tw", "timm": "vw", "bert": "tw", "coca": "vtmw"}
PARTS = {"v": ("vision_cfg", VISION), "t": ("text_cfg", TEXT), "m": ("multimodal_cfg", CAPTIONS), "w": ("", WHOLE)}
BERT = {"vocab_size": 41, "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 1, "pad_token_id": 1}
BERT |= {"num_attention_heads": 2, "max_position_embeddings": 10, "type_vocab_size": 2}
BERT |= {"d_model": 32, "d_kv": 16, "d_ff": 36, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}


def configured(base: str, berts: Path, part: str = "", name: str = "", value: Any = None) -> Config:
    """Return a base's configuration, one field moved."""
    whole: Config = {"embed_dim": 32, **copy.deepcopy(BASES[base][1])}
    if name:
        (whole[part] if part else whole)[name] = value
    text = whole["text_cfg"]
    if "hf_model_name" in text:
        text["hf_model_name"] = str(berts / text["hf_model_name"])
        text.setdefault("hf_model_pretrained", False)
    return whole
