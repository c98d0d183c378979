"""Canonical models on a device of their own and in half precision: every tensor where the model is, in its dtype.

``fake_device`` holds numbers apart from the CPU's as a GPU does, so that a tensor created on the CPU in the middle of a
pass raises here as it would there. The last test needs a real GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_device import DeviceTensor
from kinds import KINDS, drawn, inputs_on, passes
from models import VARIANTS
from models import build as variant_of

from prisma_core.inputs import Preprocess
from prisma_core.transformer import HookedDual, HookedText, HookedViT
from prisma_core.zoo import tensors_of

HALF = [torch.bfloat16, torch.float16]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and no CUDA device is here")


@pytest.mark.parametrize("kind", KINDS)
def test_all_runs_where_the_model_is(kind: str, device: torch.device) -> None:
    model = drawn(KINDS[kind]).to(device)
    assert all(isinstance(x, DeviceTensor) for x in tensors_of(model).values())
    passes(model, device, torch.float32)


@pytest.mark.parametrize("part", VARIANTS)
def test_each_part_runs_where_the_model_is(part: str, device: torch.device) -> None:
    passes(variant_of(**VARIANTS[part], layers=1).to(device), device, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_device_of_torch_is_not_where_the_model_is(kind: str) -> None:
    model, positions = drawn(KINDS[kind]), [0, -1]
    inputs = model.sample_inputs(generator=torch.Generator().manual_seed(0))
    picture = np.zeros((9, 8, 3), dtype=np.uint8)
    prepare = Preprocess(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.5, 0.4, 0.3))
    _, expected = model.run_with_cache(*inputs, pos=positions)
    with torch.device("meta"):
        again = model.sample_inputs(generator=torch.Generator().manual_seed(0))
        _, cache = model.run_with_cache(*again, pos=positions)
        pixels = prepare(picture)
    assert torch.equal(pixels, prepare(picture))
    for name in expected:
        assert torch.equal(cache[name], expected[name])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_runs_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    """A cache holds the model's own dtype, at every hook point."""
    passes(drawn(KINDS[kind]).to(dtype), torch.device("cpu"), dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("part", VARIANTS)
def test_each_part_runs_in_half_precision(part: str, dtype: torch.dtype) -> None:
    passes(variant_of(**VARIANTS[part], layers=1).to(dtype), torch.device("cpu"), dtype)


WHOLE = ["positions resized", "video", "causal text"]


def decompositions(model: HookedViT | HookedText, device: torch.device, dtype: torch.dtype) -> None:
    _, cache = model.run_with_cache(*inputs_on(model, device, dtype))
    results = [
        cache.decompose_resid(layer=-1)[0], cache.accumulated_resid(layer=-1)[0], cache.stack_head_results()[0],
        cache.stack_neuron_results(layer=-1)[0], cache.logit_attrs(cache.decompose_resid(layer=-1)[0], [0, 1]),
    ]  # fmt: skip
    results += [model.W_Q, model.OV.AB, model.QK.A]
    for x in results:
        assert x.device == device
        assert x.dtype == dtype


@pytest.mark.parametrize("kind", WHOLE)
@torch.no_grad()
def test_decompositions_stay_where_the_model_is(kind: str, device: torch.device) -> None:
    decompositions(drawn(KINDS[kind]).to(device), device, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", WHOLE)
@torch.no_grad()
def test_decompositions_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    decompositions(drawn(KINDS[kind]).to(dtype), torch.device("cpu"), dtype)


def zero_shot(device: torch.device | str, dtype: torch.dtype) -> None:
    model: HookedDual = drawn(KINDS["images and texts"]).to(device, dtype)
    model.preprocess = Preprocess(size=(8, 12))
    model.tokenizer = lambda texts: torch.tensor([[1, 2, 4 + len(each) % 3, 7, 7, 7, 7] for each in texts])
    images = list(np.random.default_rng(0).integers(0, 256, (2, 9, 14, 3), dtype=np.uint8))
    probabilities = model.classify(images, ["cat", "elephant"])
    assert (probabilities.device.type, probabilities.dtype) == (torch.device(device).type, dtype)
    torch.testing.assert_close(probabilities.float().cpu().sum(-1), torch.ones(2), rtol=0, atol=0.02)
    assert model.encode_text("cat").dtype == dtype


@torch.no_grad()
def test_texts_go_where_the_model_is(device: torch.device) -> None:
    zero_shot(device, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_zero_shot_in_half_precision(dtype: torch.dtype) -> None:
    zero_shot("cpu", dtype)


@GPU
def test_on_a_gpu() -> None:
    passes(drawn(KINDS["positions resized"]).to("cuda:0"), torch.device("cuda:0"), torch.float32)
