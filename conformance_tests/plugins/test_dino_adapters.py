"""transformers' DINOv2 and DINOv3: what conformance cases do not reach, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prisma_dino.cases import V2, V3, build
from torch import nn

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.conformance.randomise import randomise
from prisma_core.errors import InputError, NotApplicable

pytest.importorskip("transformers", reason="transformers is not installed: pip install prisma-interp[hf]")


def drawn(kind: str, config: str, **options: Any) -> nn.Module:
    model = build(kind, f"{config}Config", {**(V3 if "3" in config else V2), **options})
    return randomise(model, torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("registers", ["", "WithRegisters"])
def test_as_many_patches_in_another_shape_have_positions_of_their_own(registers: str) -> None:
    upstream = drawn(f"Dinov2{registers}Model", f"Dinov2{registers}", image_size=8)
    model = prisma.adapt(upstream)
    image = torch.randn(1, 3, 4, 16, dtype=torch.float64)  # four patches in a row, natively two by two
    torch.testing.assert_close(model(image), upstream(image).pooler_output, rtol=1e-10, atol=1e-10)


def test_every_output_of_upstream_is_a_hook_point() -> None:
    upstream = drawn("Dinov2Backbone", "Dinov2", out_features=["stem", "stage1", "stage2"], apply_layernorm=False)
    image = torch.randn(2, 3, 20, 12, dtype=torch.float64)
    _, cache = prisma.adapt(upstream).run_with_cache(image)
    names = ["hook_full_embed", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    for name, feature_map in zip(names, upstream(image).feature_maps, strict=True):
        ours = cache.layout.grid(cache[name]).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, feature_map, rtol=1e-10, atol=1e-10)
    model = drawn("DINOv3ViTModel", "DINOv3ViT")
    _, cache = prisma.adapt(model).run_with_cache(image)
    torch.testing.assert_close(cache["hook_ln_final"], model(image).last_hidden_state, rtol=1e-10, atol=1e-10)


def test_a_classifier_without_classes_returns_what_it_pools() -> None:
    upstream = drawn("Dinov2ForImageClassification", "Dinov2", num_labels=0)
    image = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    model = prisma.adapt(upstream)
    assert model(image).shape == (2, 48)
    torch.testing.assert_close(model(image), upstream(image).logits, rtol=1e-10, atol=1e-10)


def test_a_mean_beside_a_token_is_no_sum_over_one_stream() -> None:
    model = prisma.adapt(drawn("Dinov2ForImageClassification", "Dinov2"))
    _, cache = model.run_with_cache(torch.randn(1, 3, 12, 12, dtype=torch.float64))
    with pytest.raises(NotApplicable, match="side by side"):
        cache.logit_attrs(cache["resid_post", -1], classes=0)


def test_looking_at_patterns_leaves_upstream_as_it_was() -> None:
    upstream = drawn("Dinov2Model", "Dinov2")
    before = upstream.config._attn_implementation
    report = prisma.check(upstream, checks="parity.hooks")
    report.raise_for_failures()
    assert upstream.config._attn_implementation == before


@pytest.mark.parametrize(
    ("kind", "config", "options", "feature"),
    [
        ("Dinov2Model", "Dinov2", {"image_size": (12, 8)}, "not square"),
        ("Dinov2Model", "Dinov2", {"patch_size": (4, 2)}, "not square"),
        ("Dinov2Model", "Dinov2", {"hidden_act": "mish"}, "activation"),
        ("Dinov2Backbone", "Dinov2", {"out_features": ["stage1"]}, "stage2"),
        ("DINOv3ViTBackbone", "DINOv3ViT", {"out_features": ["stem"]}, "stage2"),
        ("DINOv3ViTModel", "DINOv3ViT", {"query_bias": False}, "biases"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_feature(
    kind: str, config: str, options: dict[str, Any], feature: str
) -> None:
    with pytest.raises(UnsupportedArchitecture, match=feature):
        prisma.adapt(drawn(kind, config, **options))


def test_registers_that_the_config_denies_are_refused() -> None:
    upstream = drawn("Dinov2WithRegistersForImageClassification", "Dinov2WithRegisters", num_register_tokens=2)
    upstream.config.num_register_tokens = 1  # upstream would pool one of them with the patches
    with pytest.raises(UnsupportedArchitecture, match="another number"):
        prisma.adapt(upstream)


def test_sizes_that_cut_patches_are_refused() -> None:
    model = prisma.adapt(drawn("DINOv3ViTModel", "DINOv3ViT"))
    with pytest.raises(InputError, match="multiples of the patch"):
        model(torch.randn(1, 3, 10, 12, dtype=torch.float64))
