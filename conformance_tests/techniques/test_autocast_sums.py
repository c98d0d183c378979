"""Attribution under autocast, and of caches that were taken in it, whose activations are of several dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import build
from prisma_lens import attribute, head_outputs, probe, relevance, second_order
from torch import Tensor

import prisma_core as prisma
from prisma_core import ActivationCache, HookedViT, NotApplicable

DTYPES = [torch.bfloat16, torch.float16]
BY = ["layer", "head", "neuron", "source"]


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return build(scale=True)


@pytest.fixture(scope="module")
def image(model: HookedViT) -> Tensor:
    return model.sample_inputs(3, generator=torch.Generator().manual_seed(2))[0]


def taken(model: HookedViT, image: Tensor, dtype: torch.dtype) -> ActivationCache:
    with torch.autocast("cpu", dtype):
        return model.run_with_cache(image)[1]


def total(made: Any) -> Tensor:
    rest = made.tensors.get("rest", torch.zeros(()))
    return made.values.flatten(0, made.values.ndim - 3).sum(0) + made.tensors["constant"] + rest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", BY)
def test_a_cache_that_was_taken_under_autocast(model: HookedViT, image: Tensor, dtype: torch.dtype, by: Any) -> None:
    cache = taken(model, image, dtype)
    assert {x.dtype for x in cache.values()} == {dtype, torch.float32}
    made = attribute(model, cache, [0, 3], by=by)
    assert made.values.dtype == torch.float32  # addends are rounded, what is made of them is not
    size = made.values.abs().flatten(0, made.values.ndim - 3).sum(0)
    assert ((total(made) - cache["hook_logits"][:, [0, 3]]).abs() <= 8 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_neurons_to_second_order_of_such_a_cache(model: HookedViT, image: Tensor, dtype: torch.dtype) -> None:
    exact, made = (second_order(model, each, 0).values for each in (image, taken(model, image, dtype)))
    assert (made - exact).abs().max() <= 12 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", BY)
def test_an_exact_cache_is_attributed_under_autocast(
    model: HookedViT, image: Tensor, dtype: torch.dtype, by: Any
) -> None:
    cache = model.run_with_cache(image)[1]
    exact = attribute(model, cache, 0, by=by)
    with torch.autocast("cpu", dtype):
        made = attribute(model, cache, 0, by=by)
        within = attribute(model, image, 0, by=by)
        heads = head_outputs(model, image, progress=False)
    for each in (made, within):
        assert (each.values - exact.values).abs().max() <= 32 * torch.finfo(dtype).eps * exact.values.abs().max()
    assert heads.values.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_edit_of_the_stream_is_still_refused(model: HookedViT, image: Tensor, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype), model.hooks({("resid_post", 0): lambda x, at: 2 * x}):
        cache = model.run_with_cache(image)[1]
        with pytest.raises(NotApplicable, match="components sum to"):
            attribute(model, cache, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_relevance_beside_a_tokens_own(model: HookedViT, image: Tensor, dtype: torch.dtype) -> None:
    def own(model: HookedViT, image: Tensor) -> Tensor:
        return relevance(model, image, lambda logits: logits[:, 0] / 30).values.diagonal(dim1=1, dim2=2)

    exact = own(model, image)
    assert 1e-4 < exact.max() < 0.01  # beside the 1 of the equation
    with torch.autocast("cpu", dtype):
        mixed = own(model, image)
    for made in (mixed, own(copy.deepcopy(model).to(dtype), image.to(dtype))):
        assert (made - exact).abs().max() <= 32 * torch.finfo(dtype).eps * exact.max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_probe_of_such_a_cache(dtype: torch.dtype) -> None:
    model: Any = prisma.load("toy:scenes-3l")
    images = torch.rand(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    made = probe(model, [(images, torch.arange(8) % 2)], names=("resid_post", 1))
    attributed = attribute(model, taken(model, images, dtype), made)
    exact = attribute(model, images, made)
    assert (attributed.values - exact.values).abs().max() <= 12 * torch.finfo(dtype).eps * exact.values.abs().max()
