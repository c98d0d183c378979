"""Asking for activations changes no number beyond rounding, in any dtype and with massive channels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import build

from prisma_core.hooks.point import HookPoint, Scope, ScopeContext
from prisma_core.spec import NormSpec
from prisma_core.toolbox.precision import HALF, autocast_on
from prisma_core.transformer.attention import attend
from prisma_core.transformer.norm import Norm

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LARGEST = {torch.float16: 6e4, torch.bfloat16: 1e18, torch.float32: 1e18}
ROUNDINGS = 8  # how many units in the last place of the largest logit two kernels may lie apart


def massive(vit, size, dtype):
    """Give one channel of one token a size, in a dtype."""
    with torch.no_grad():
        (vit.embed.prefix if vit.layout.n_prefix else vit.embed.pos_embed)[0, 5] = size
    return vit.to(dtype)


def close(found, expected, dtype):
    bound = ROUNDINGS * torch.finfo(dtype).eps * expected.double().abs().max()
    assert (found.double() - expected.double()).abs().max() <= bound


def reading(rows, *points):
    """Append to ``rows`` what the hook points show."""
    return ScopeContext(Scope(frozenset(points), captures={point.key: (rows.append,) for point in points}), None)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_asking_for_any_point_changes_no_number_beyond_rounding(variant, image, dtype, grad):
    points = variant.hook_points()
    finite = 0
    for size in (1.0, 300.0, 5000.0, LARGEST[dtype]):
        vit, x = massive(variant, size, dtype), image.to(dtype)
        with torch.set_grad_enabled(grad):
            plain = vit(x)
            if not plain.isfinite().all():  # upstream's kernel overflows too
                continue
            finite += 1
            close(vit.run_with_cache(x)[0], plain, dtype)
            close(vit.run_with_cache(x, names=list(points))[0], plain, dtype)
    assert finite >= 2 + (variant.spec.blocks[0].ln1 is not None)


@pytest.mark.parametrize("kind", ["ln", "rms"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-4, 1.0, 257.0, 300.0, 5000.0, 6e4])
def test_scales_are_those_of_exact_numbers(dtype, size, grad, kind):
    torch.manual_seed(0)
    norm = Norm(NormSpec(kind=kind, eps=1e-12), 48).to(dtype)
    x = torch.randn(2, 3, 48).mul(size or 1).clamp(-6e4, 6e4).to(dtype)
    x[0, 1] = 0  # a token without variance
    shown: list[torch.Tensor] = []
    with torch.set_grad_enabled(grad), reading(shown, norm.hook_scale):
        found = norm(x.requires_grad_(grad))
    wide = x.double() - (x.double().mean(-1, keepdim=True) if kind == "ln" else 0)
    exact = (wide.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    torch.testing.assert_close(shown[0], exact.to(dtype))
    assert found.isfinite().all()
    torch.testing.assert_close(found, norm.fused(x))
    assert not found[0, 1].any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_what_a_hook_sets_is_used(dtype):
    norm = Norm(NormSpec(eps=1e-5), 16).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 16).to(dtype)
    hooked = build(scale=True).to(dtype)
    image = torch.randn(2, 3, 8, 12).to(dtype)
    three = {("ln1.scale", 1): lambda s, at: torch.full_like(s, 3)}
    _, cache = hooked.run_with_cache(image, names=["ln1.normalized", "resid_pre"], hooks=three)
    ln1, stream = hooked.blocks[1].ln1, cache["resid_pre", 1].float()
    expected = (stream - stream.mean(-1, keepdim=True)) / 3 * ln1.weight.float() + ln1.bias.float()
    torch.testing.assert_close(cache["ln1.normalized", 1], expected.to(dtype))
    assert norm.linear(x, torch.zeros(2, 3, 1, dtype=dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_scores_beyond_the_dtype_are_attended_as_by_the_kernel(dtype):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 5, 3, 8).mul(factor).to(dtype) for factor in (300, 300, 1))
    points = HookPoint("", "scores"), HookPoint("", "pattern")
    fused = attend(q, k, v, 0.35, None, *points)
    seen: list[torch.Tensor] = []
    with reading(seen, *points):
        explicit = attend(q, k, v, 0.35, None, *points)
    torch.testing.assert_close(explicit, fused)
    assert [x.dtype for x in seen] == [dtype, dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_may_read_no_key_are_zero_as_in_the_kernel(dtype):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 5, 3, 8).to(dtype).requires_grad_() for _ in range(3))
    bias = torch.zeros(1, 1, 5, 5, dtype=dtype)
    bias[..., 2, :] = -torch.inf
    bias[..., 3, 1:] = -torch.inf
    points = HookPoint("", "scores"), HookPoint("", "pattern")
    fused = attend(q, k, v, 0.35, bias, *points)
    seen: list[torch.Tensor] = []
    with reading(seen, *points):
        explicit = attend(q, k, v, 0.35, bias, *points)
    assert not fused[:, 2].any()
    close(explicit, fused, dtype)
    assert not seen[1][:, :, 2].any()
    both = [torch.autograd.grad(out.float().square().sum(), (q, k, v)) for out in (fused, explicit)]
    for grads in zip(*both, strict=True):
        close(*grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_pass_as_without_asking(dtype):
    vit = massive(build(attn_bias=True), 300.0, dtype)
    image = torch.randn(2, 3, 8, 12).to(dtype)
    grads = []
    for names in ([], ["*.hook_scale", "attn_scores", "pattern", "result", "q_input", "k_input"]):
        x = image.clone().requires_grad_()
        out = vit.run_with_cache(x, names=names)[0] if names else vit(x)
        grads.append(torch.autograd.grad(out.float().sum(), x)[0])
    bound = 16 * torch.finfo(dtype).eps * grads[0].float().abs().max()
    assert (grads[1].float() - grads[0].float()).abs().max() <= bound


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_decompositions_of_half_precision(dtype):
    vit = massive(build(layers=1), 300.0, dtype)
    image = torch.randn(2, 3, 8, 12).to(dtype)
    with torch.no_grad():
        logits, cache = vit.run_with_cache(image)
        total = cache.project_stack(cache.decompose_resid()).float().sum(0) + cache.logit_constant()
    assert total.isfinite().all()
    assert (total - logits).abs().max() <= 64 * torch.finfo(dtype).eps * cache.decompose_resid().abs().max()


@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu", "mps", "mtia", "privateuseone"])
def test_autocast_is_seen_on_every_device(kind: str) -> None:
    """Torch's question about all devices leaves some of them out."""
    x: Any = SimpleNamespace(device=torch.device(kind), is_cpu=kind == "cpu", is_cuda=kind == "cuda")
    assert not autocast_on(x)
    torch.set_autocast_enabled(kind, True)
    try:
        assert autocast_on(x)
    finally:
        torch.set_autocast_enabled(kind, False)
    assert not autocast_on(x)
