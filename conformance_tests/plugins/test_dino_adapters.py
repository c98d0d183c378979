"""transformers' DINOv2 and DINOv3: what conformance cases do not reach, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_conformance.randomise import randomise
from prisma_dino import meta_cases
from prisma_dino.canonical.dinov2 import Dinov2Adapter
from prisma_dino.canonical.dinov3 import Dinov3Adapter
from prisma_dino.canonical.meta_adapter import MetaAdapter
from prisma_dino.cases import V2, V3, build
from prisma_dino.meta import Architecture
from torch import nn

import prisma_core as prisma
from prisma_core import ModelSpec, UnsupportedArchitecture
from prisma_core.errors import InputError
from prisma_core.host import installed
from prisma_core.maps.reader import Reader
from prisma_core.maps.weights import WeightMap
from prisma_core.spec import PoolSpec

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


def test_a_mean_beside_a_token_is_read_by_the_head_part_by_part() -> None:
    model = prisma.adapt(drawn("Dinov2ForImageClassification", "Dinov2"))
    logits, cache = model.run_with_cache(torch.randn(2, 3, 12, 12, dtype=torch.float64))
    stack = cache.decompose_resid()
    total = cache.logit_attrs(stack, classes=0).sum(0) + cache.logit_constant(0)
    torch.testing.assert_close(total, logits[:, 0], rtol=0, atol=1e-10 * logits.std().item())
    assert cache.logit_attrs(stack, classes=0).std() > 0.01 * logits.std()


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
        ("DINOv3ViTModel", "DINOv3ViT", {"query_bias": False, "key_bias": True, "value_bias": False}, "biases"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_feature(
    kind: str, config: str, options: dict[str, Any], feature: str
) -> None:
    with pytest.raises(UnsupportedArchitecture, match=feature):
        prisma.adapt(drawn(kind, config, **options))


@pytest.mark.parametrize("lacking", [("query", "key"), ("key", "value")])
def test_two_biases_of_three_may_be_missing(lacking: tuple[str, str]) -> None:
    upstream = drawn("DINOv3ViTModel", "DINOv3ViT", **{f"{name}_bias": name not in lacking for name in lacking})
    model, image = prisma.adapt(upstream), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(model(image), upstream(image).pooler_output, rtol=1e-10, atol=1e-10)
    state = upstream.state_dict()
    assert prisma.export(model).keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in prisma.export(model).items())


@pytest.mark.parametrize("shape", [{"patch": (4, 2)}, {"grid": (2, 3)}])
def test_metas_positions_of_an_image_that_is_not_square_are_refused(shape: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedArchitecture, match="not square"):  # Meta resizes them at their native size, too
        prisma.adapt(meta_cases.build(Architecture(**{**meta_cases.SMALL, **shape})))
    upstream = meta_cases.build(Architecture(**{**meta_cases.SMALL, **meta_cases.THIRD, **shape}))  # they turn
    randomise(upstream.double(), torch.Generator().manual_seed(0))
    model = prisma.adapt(upstream)
    image = torch.randn(1, 3, *model.sizes()[0], dtype=torch.float64)
    torch.testing.assert_close(model(image), upstream(image), rtol=1e-10, atol=1e-10)


def test_registers_that_the_config_denies_are_refused() -> None:
    upstream = drawn("Dinov2WithRegistersForImageClassification", "Dinov2WithRegisters", num_register_tokens=2)
    upstream.config.num_register_tokens = 1  # upstream would pool one of them with the patches
    with pytest.raises(UnsupportedArchitecture, match="another number"):
        prisma.adapt(upstream)


def test_sizes_that_cut_patches_are_refused() -> None:
    model = prisma.adapt(drawn("DINOv3ViTModel", "DINOv3ViT"))
    with pytest.raises(InputError, match="multiples of the patch"):
        model(torch.randn(1, 3, 10, 12, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("Dinov2WithRegistersModel", "Dinov2WithRegisters"),
        ("Dinov2ForImageClassification", "Dinov2"),
        ("DINOv3ViTModel", "DINOv3ViT"),
    ],
)
def test_folders_that_transformers_wrote_come_in_through_its_source(kind: str, config: str, tmp_path: Path) -> None:
    upstream = drawn(kind, config).float()
    for part in upstream.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-5 if "3" in config else 1e-6  # the config's
    upstream.save_pretrained(tmp_path)
    model, image = prisma.load(f"hf:{tmp_path}"), torch.randn(2, 3, 16, 20)
    theirs = upstream(image)
    wanted = theirs.logits if "logits" in theirs else theirs.pooler_output
    torch.testing.assert_close(model(image), wanted, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- broken adapters, and what catches them


def _interpolation(**update: Any) -> Any:
    def change(spec: ModelSpec) -> ModelSpec:
        how = spec.embed.interpolation.model_copy(update=update)
        return spec.model_copy(update={"embed": spec.embed.model_copy(update={"interpolation": how})})

    return change


def _centred(spec: ModelSpec) -> ModelSpec:
    """Periods and unrounded coordinates, as timm has them."""
    grid = spec.rope.grid
    waves = tuple(1 / wave for wave in grid.waves)
    grid = grid.model_copy(update={"coordinates": "centred", "waves": waves})
    return spec.model_copy(update={"rope": spec.rope.model_copy(update={"grid": grid})})


BROKEN = {
    "positions antialiased": (Dinov2Adapter, "dinov2", _interpolation(antialias=True), "parity.logits"),
    "positions not antialiased": (Dinov2Adapter, "dinov2_registers", _interpolation(antialias=False), "parity.logits"),
    "positions in float64": (Dinov2Adapter, "dinov2", _interpolation(in_float32=False), "parity.logits"),
    "no offset": (MetaAdapter, "meta_v2", _interpolation(offset=0.0), "parity.logits"),
    "the first one's positions in float32": (MetaAdapter, "meta_v1", _interpolation(in_float32=True), "parity.logits"),
    "another library's rounding of angles": (Dinov3Adapter, "dinov3", _centred, "parity.logits"),
    "a mean over registers": (
        Dinov2Adapter,
        "dinov2_registers_classifier",
        lambda spec: spec.model_copy(update={"pool": PoolSpec(kind="token_and_avg", with_prefix=True)}),
        "parity.hooks",
    ),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_fact_is_caught(mistake: str) -> None:
    kind, name, change, caught_by = BROKEN[mistake]

    class Broken(kind):
        def spec(self, upstream: Reader) -> ModelSpec:
            return change(super().spec(upstream))

    case = next(case for case, _ in installed().cases({"dino"}) if case.name == name)
    prisma.check(case, adapter=kind(), checks=caught_by).raise_for_failures()
    assert not prisma.check(case, adapter=Broken(), checks=caught_by).passed


@pytest.mark.parametrize(
    ("kind", "name", "right", "wrong"),
    [
        (Dinov2Adapter, "dinov2_registers", "around", lambda x: torch.cat([x[0], x.new_zeros(3, x.shape[2])])),
        (MetaAdapter, "meta_v3", "masked", lambda bias, mask: bias + 0 * mask),
        (MetaAdapter, "meta_v3", "rope", lambda periods: periods.new_ones(26, 1, 8)),
    ],
)
def test_a_broken_function_of_weights_is_caught(kind: Any, name: str, right: str, wrong: Any) -> None:
    class Broken(kind):
        def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
            table = super().weights(upstream, spec)
            rows = (replace(row, call=wrong) if row.function == right else row for row in table.rows)
            return replace(table, rows=tuple(rows))

    case = next(case for case, _ in installed().cases({"dino"}) if case.name == name)
    assert not prisma.check(case, adapter=Broken(), checks="parity.logits").passed
