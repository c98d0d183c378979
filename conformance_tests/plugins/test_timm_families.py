"""What the constructors of timm's rotary and relative families can build beyond the registry, and their tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from prisma_conformance.run import check
from torch import nn

import prisma_core as prisma
from prisma_core.contract.case import Case
from prisma_core.errors import UnsupportedArchitecture, WeightMapError

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from timm.models.beit import Beit  # noqa: E402
from timm.models.deepseek_vit import DeepseekVitClassifier  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.naflexvit import NaFlexVit  # noqa: E402
from timm.models.qwen3_vit import Qwen3VitClassifier  # noqa: E402
from timm.models.vision_transformer_relpos import VisionTransformerRelPos  # noqa: E402

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
NARROW: dict[str, Any] = {**TINY, "patch_size": 8, "num_classes": 7}
SMALL: dict[str, Any] = {**NARROW, "img_size": (24, 32)}


def eva(**given: Any) -> nn.Module:
    return Eva(**{**SMALL, "init_values": 0.1, "use_rot_pos_emb": True, "class_token": True, **given})


def beit(**given: Any) -> nn.Module:
    return Beit(**{**SMALL, **given})


def relpos(**given: Any) -> nn.Module:
    return VisionTransformerRelPos(**{**SMALL, "rel_pos_dim": 9, **given})


def naflex(**given: Any) -> nn.Module:
    return NaFlexVit(**{**NARROW, "pos_embed_grid_size": (3, 4), "class_token": True, "global_pool": "avg", **given})


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "all tokens": partial(eva, global_pool="", num_classes=0),
    "positions learned and rotary, other sizes": partial(eva, dynamic_img_size=True, num_reg_tokens=2),
    "rotary, columns first, rescaled": partial(
        eva, dynamic_img_size=True, rope_grid_indexing="xy", rope_grid_offset=0.5, ref_feat_shape=(5, 7)
    ),
    "rotary, centred, neighbours, columns first": partial(
        eva, dynamic_img_size=True, rope_type="dinov3", rope_grid_indexing="xy", rope_grid_offset=0.3
    ),
    "rotary, centred, halves, registers, no positions": partial(
        eva, dynamic_img_size=True, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=3, use_abs_pos_emb=False
    ),
    "rotary of three axes": partial(eva, rope_type="mrope", rope_mrope_section=(0, 2, 2)),
    "learned frequencies": partial(eva, rope_type="mixed", dynamic_img_size=True),
    "grouped heads, norms of queries and keys": partial(
        eva, attn_type="rope", qkv_fused=False, num_kv_heads=(3, 1), qk_norm=True, attn_only_layer_scale=True
    ),
    "projections apart": partial(eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True),
    "norms behind, no biases": partial(eva, use_post_norm=True, qkv_bias=False, swiglu_mlp=True, init_values=None),
    "latent queries, no class token": partial(eva, global_pool="map", class_token=False, num_reg_tokens=2),
    "biases of their own and shared": partial(beit, use_rel_pos_bias=True, use_shared_rel_pos_bias=True),
    "shared biases, no others": partial(beit, use_shared_rel_pos_bias=True, qkv_bias=False, init_values=0.1),
    "no relative biases": partial(beit, swiglu_mlp=True, scale_mlp=True, global_pool="token"),
    "table of biases with a class token": partial(relpos, rel_pos_type="bias", class_token=True, qk_norm=True),
    "shared table of biases": partial(relpos, rel_pos_type="bias", shared_rel_pos=True),
    "biases from a gated MLP": partial(relpos, rel_pos_type="mlp_swin", class_token=True, global_pool=""),
    "any image, factorized positions": partial(naflex, pos_embed="factorized", pos_embed_ar_preserving=True),
    "any image, convolution, aligned": partial(
        naflex, embed_proj_type="conv", pos_embed_interp_mode="bilinear", pos_embed_align_corners=True,
        pos_embed_antialias=False, pool_include_prefix=True,
    ),
    "any image, channels first, norms of patches": partial(
        naflex, patchify_channels_last=False, embed_norm_layer="layernorm", norm_layer="rmsnorm", pre_norm=True
    ),
    "any image, rotary": partial(naflex, rope_type="axial", rope_ref_feat_shape=(5, 5), reg_tokens=2),
    "any image, learned frequencies": partial(naflex, rope_type="mixed"),
    "positions of another grid": partial(Qwen3VitClassifier, **SMALL, pos_embed_grid_size=5),
    "no final norm": partial(DeepseekVitClassifier, **SMALL, final_norm=False, global_pool=""),
}  # fmt: skip
CHECKS = ["parity.*", "weights.*", "spec.audit", "algebra"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    report = check(Case(name, VARIANTS[name]), checks=CHECKS)
    results = [result for certificate in report.certificates for result in certificate.results]
    failed = [str(result) for result in results if not result.passed and not result.skipped]
    assert len(results) > len(CHECKS)
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(
    ("build", "feature"),
    [
        (partial(eva, global_pool="avgmax"), "avgmax"),
        (partial(eva, dynamic_img_size=True, dynamic_img_pad=True), "padding"),
        (partial(naflex, attn_gated=True, attn_type="rope"), "gate"),
        (partial(naflex, dynamic_img_pad=True), "padding"),
        (partial(Qwen3VitClassifier, **SMALL, encoder_pool="merge", out_features=9), "projector"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_feature(build: Callable[[], nn.Module], feature: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=feature):
        prisma.adapt(build())


def test_tables_for_another_grid_are_those_of_the_native_one_there() -> None:
    centred = partial(eva, dynamic_img_size=True, rope_type="dinov3", rope_rotate_half=True)
    model, other = prisma.adapt(centred().double()), prisma.adapt(centred(img_size=(40, 16)).double())
    made = model._rope_tables((5, 2))
    torch.testing.assert_close(made.cos, other.rope_cos.detach(), rtol=0, atol=1e-14)
    torch.testing.assert_close(made.sin, other.rope_sin.detach(), rtol=0, atol=1e-14)
    assert not torch.equal(made.cos, model._rope_tables((2, 5)).cos)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (partial(eva, rope_type="mixed"), "rope_sin"),
        (partial(beit, use_rel_pos_bias=True), "blocks.1.attn.attn_bias"),
        (partial(relpos), "blocks.0.attn.attn_bias"),
    ],
)
def test_a_changed_table_cannot_be_exported(build: Callable[[], nn.Module], name: str) -> None:
    model = prisma.adapt(build())
    assert prisma.export(model).keys() == build().state_dict().keys()
    with torch.no_grad():
        model.get_parameter(name)[..., -1, -1] += 1
    with pytest.raises(WeightMapError, match="was changed"):
        prisma.export(model)


def test_a_key_bias_upstream_keeps_at_zero_cannot_be_exported() -> None:
    model = prisma.adapt(timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=2, img_size=32))
    assert set(prisma.export(model)) == set(model.origin.persistent)
    with torch.no_grad():
        model.blocks[0].attn.b_K.add_(1.0)
    with pytest.raises(prisma.WeightMapError, match="k_bias"):
        prisma.export(model)


def test_one_size_stays_one_size_where_tables_cannot_follow() -> None:
    model = prisma.adapt(eva(rope_type="mixed", dynamic_img_size=True))
    with pytest.raises(prisma.errors.InputError, match="one size"):
        model(torch.zeros(1, 3, 32, 24))
