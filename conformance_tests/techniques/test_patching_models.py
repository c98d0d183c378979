"""Patching on models of other kinds: rotary positions, attentions side by side, grids, windows, half precision."""

from __future__ import annotations

import pytest
import torch
from models import build
from prisma_patch import activation_patch, logit_difference, patch_heads
from torch import Tensor
from windows import stages

from prisma_core import HookedViT, InputError, NotApplicable
from prisma_core.maps.places import HookMap
from prisma_core.spec import MapSpec, RopeGrid
from prisma_core.upstream.model import HookedUpstream

EXACT = {"rtol": 1e-10, "atol": 1e-10}
METRIC = logit_difference(4, 2)


@pytest.fixture(autouse=True)
def _float64(in_float64: None) -> None:
    """All models here are in float64."""


def image(seed: int, batch: int = 1, size: tuple[int, int] = (8, 12)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_heads_of_a_larger_image_are_patched_with_its_own_rotary_positions() -> None:
    model = build(rope=True, interpolation=True)
    assert model.spec.rope is not None
    rope = model.spec.rope.model_copy(update={"grid": RopeGrid(coordinates="index", waves=(0.7,))})
    narrow = [
        block.model_copy(update={"attn": block.attn.model_copy(update={"d_head": 4})}) for block in model.spec.blocks
    ]
    spec = model.spec.model_copy(update={"rope": rope, "blocks": tuple(narrow)})
    model = HookedViT(spec).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    # As many patches as the native image has, so that tables of the wrong grid would fit.
    clean, other = image(1, size=(12, 8)), image(2, size=(12, 8))
    _, cache = model.run_with_cache(other)

    def swap(z: Tensor, at: object) -> None:
        z[:, :, 2] = cache["z", 0][:, :, 2]

    patched = model.run_with_hooks(clean, hooks={("z", 0): swap})
    effect = patch_heads(model, clean, other, METRIC).values[0, 2]
    torch.testing.assert_close(effect, METRIC(patched) - METRIC(model(clean)), **EXACT)


def test_attentions_side_by_side_line_up_their_heads_in_a_layer() -> None:
    model = build(n_parallel=2)
    clean, other = image(1), image(2)
    _, cache = model.run_with_cache(other)

    def swap(z: Tensor, at: object) -> None:
        z[:, :, 1] = cache["blocks.1.attn.1.hook_z"][:, :, 1]

    effects = patch_heads(model, clean, other, METRIC)
    heads = model.spec.blocks[0].attn.n_heads
    assert effects.shape == {"layer": 2, "head": 2 * heads, "batch": 1}
    patched = model.run_with_hooks(clean, hooks={"blocks.1.attn.1.hook_z": swap})
    torch.testing.assert_close(
        effects.sel(layer="L1", head=f"H{heads + 1}").values, METRIC(patched) - METRIC(model(clean)), **EXACT
    )
    with pytest.raises(NotApplicable, match="several of these hook points"):
        activation_patch(model, clean, other, METRIC, at="z", over="layer")


def grid() -> HookedUpstream:
    """Return a model whose stream is a grid, as Swin's is, and that reads every place of it otherwise."""
    torch.manual_seed(0)
    stages = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(96, 4))
    rows = "0 -> blocks.0.hook_resid_post : batch row column d_model\n3 -> hook_logits : batch class"
    return HookedUpstream(stages, HookMap.parse(rows), MapSpec(shape=(3, 4, 5)), lambda result: result)


@torch.no_grad()
def test_regions_of_a_grid_are_patched_as_by_hand() -> None:
    model, metric = grid(), logit_difference(0, 1)
    clean, other = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    name = "blocks.0.hook_resid_post"
    _, cache = model.run_with_cache(other)
    for region in ((1, slice(0, 2)), (slice(None), -1), (2, 3)):

        def swap(x: Tensor, at: object, region: tuple[object, object] = region) -> None:
            x[:, region[0], region[1]] = cache[name][:, region[0], region[1]]

        by_hand = metric(model.run_with_hooks(clean, hooks={name: swap})) - metric(model(clean))
        effect = activation_patch(model, clean, other, metric, at=name, over="", region=region).values
        torch.testing.assert_close(effect, by_hand)
        assert effect.abs().min() > 1e-8
    by_row = activation_patch(model, clean, other, metric, at=name, over="row column")
    assert by_row.shape == {"row": 3, "column": 4, "batch": 2}
    with pytest.raises(InputError, match=r"give region=\(rows, columns\)"):
        activation_patch(model, clean, other, metric, at=name, over="", pos=0)
    with pytest.raises(InputError, match="got 3"):
        activation_patch(model, clean, other, metric, at=name, over="", region=3)
    with pytest.raises(InputError, match="give pos="):
        activation_patch(build(), image(1), image(2), metric, at=("resid_pre", 0), over="", region=(0, 1))


def test_heads_stand_on_the_axis_named_head_and_layers_are_counted_across_stages() -> None:
    model, x = stages(2), torch.randn(3, 6, 5)
    effects = patch_heads(model, x, "zero", lambda out: out.mean(1))
    assert effects.axes == ("layer", "head", "batch", "metric0")
    assert effects.labels["layer"] == ("stages.0.blocks.0", "stages.1.blocks.0")

    def without(z: Tensor, at: object) -> None:
        z[:, :, :, 1] = 0

    for stage in range(2):
        edited = model.run_with_hooks(x, hooks={f"stages.{stage}.blocks.0.attn.hook_z": without})
        assert torch.allclose(effects.values[stage, 1], (edited - model(x)).mean(1), atol=1e-6)


def test_heads_that_differ_by_stage_are_said() -> None:
    with pytest.raises(NotApplicable, match=r"stages\.0\.blocks\.0.* has 2.*stages\.1\.blocks\.0.* has 3"):
        patch_heads(stages(3), torch.randn(1, 6, 5), "zero", lambda out: out.mean(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_effects_are_those_of_the_models_own_precision(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    clean, other = image(1).to(dtype), image(2).to(dtype)
    effects = patch_heads(model, clean, other, METRIC)
    assert effects.values.dtype == dtype
    _, cache = model.run_with_cache(other, names=("z", 0))

    def swap(z: Tensor, at: object) -> None:
        z[:, :, 1] = cache["z", 0][:, :, 1]

    by_hand = METRIC(model.run_with_hooks(clean, hooks={("z", 0): swap})) - METRIC(model(clean))
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(effects.values[0, 1], by_hand.detach(), rtol=tolerance, atol=tolerance)
