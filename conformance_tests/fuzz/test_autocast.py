"""Autocast: what runs beside the fused kernels rounds no more than they do, and cached numbers are upstream's."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from prisma_conformance.strategies import SEEDS, hook_names, inputs, random_model, specs

import prisma_core as prisma
from prisma_core.spec import AnySpec
from prisma_core.toolbox import precision

DTYPES = st.sampled_from([torch.bfloat16, torch.float16])


def sharpened(model: Any, factor: float) -> Any:
    """Scale the weights that make queries and keys."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv" in name:
                parameter *= factor
    return model


@given(specs(), SEEDS, DTYPES, st.sampled_from([1.0, 30.0]), st.booleans(), st.data())
def test_asking_changes_no_number_beyond_rounding(
    spec: AnySpec, seed: int, dtype: torch.dtype, factor: float, gradients: bool, data: st.DataObject
) -> None:
    model: Any = sharpened(random_model(spec, seed, torch.float32), factor)
    exact: Any = sharpened(random_model(spec, seed), factor)
    arguments = data.draw(inputs(spec, dtype=torch.float32))
    names = data.draw(st.none() | hook_names(model))
    hooks = data.draw(st.sampled_from([None, dict.fromkeys(names or [], lambda x, at: x.clone())]))
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype):
        plain = model(*arguments)
        assume(bool(plain.isfinite().all()))
        output, _ = model.run_with_cache(*arguments, names=names, hooks=hooks)
    truth = exact(*wide)
    error = float((plain.double() - truth).detach().abs().max())
    rounding = torch.finfo(dtype).eps * max(1.0, float(truth.detach().abs().max()))
    assert output.dtype == plain.dtype
    assert float((output.double() - plain.double()).detach().abs().max()) <= 4 * error + 64 * rounding


@pytest.fixture(params=["vit_tiny_patch16_224", "samvit_base_patch16"])
def overflowing(request: pytest.FixtureRequest) -> tuple[Any, torch.Tensor]:
    """A model whose scores are too large for float16, and images."""
    small: dict[str, dict[str, Any]] = {
        "vit_tiny_patch16_224": {"depth": 2, "img_size": 64},
        "samvit_base_patch16": {
            "img_size": 64,
            "patch_size": 16,
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 1,
            "global_attn_indexes": (0, 1),
        },
    }
    upstream: Any = timm.create_model(request.param, pretrained=False, **small[request.param]).eval()
    torch.manual_seed(0)
    for name, parameter in upstream.named_parameters():
        torch.nn.init.normal_(parameter, std=300.0 if "qkv.weight" in name else 0.1)
    model: Any = prisma.adapt(upstream)
    images = model.sample_inputs(2, generator=torch.Generator().manual_seed(1))[0]
    _, cache = model.run_with_cache(images, names="attn_scores")
    assert max(x.abs().max() for x in cache.values()) > torch.finfo(torch.float16).max
    return model, images


def judge(model: Any, images: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.float16):
        plain = model(images)
        edited = model.run_with_hooks(images, hooks={"pattern": lambda x, at: x.clone()})
        cached, cache = model.run_with_cache(images, names="pattern")
    assert plain.isfinite().all()
    scale = float(plain.abs().max())
    for output in (edited, cached):
        assert float((output - plain).abs().max()) <= 0.02 * scale
    assert all(bool(x.isfinite().all()) for x in cache.values())


@torch.no_grad()
def test_scores_too_large_for_float16(overflowing: tuple[Any, torch.Tensor]) -> None:
    judge(*overflowing)


@torch.no_grad()
def test_scores_that_autocast_rounds_would_be_seen(
    overflowing: tuple[Any, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda device: False)
    assert precision.unrounded(overflowing[1]).__class__.__name__ == "nullcontext"
    with pytest.raises(AssertionError):
        judge(*overflowing)
