"""Transforms of ``torch.func``, other kinds of derivatives, inference mode: as upstream's model, or a sentence."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from windows import Adapter, Upstream

import prisma_core as prisma
from prisma_core import HookError, InputError
from prisma_core.toolbox.derivatives import fused_attention
from prisma_core.zoo import adapt_with

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SMALL = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
pytestmark = pytest.mark.usefixtures("in_float64")


def vit():
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **SMALL).eval()


@pytest.fixture(params=["canonical", "hooked upstream"])
def pair(request, in_float64):
    """Upstream as a function, the hooked model, and an input."""
    torch.manual_seed(0)
    upstream = vit() if request.param == "canonical" else Upstream().eval()
    for parameter in upstream.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if request.param == "canonical":
        return upstream, prisma.adapt(upstream), torch.randn(2, 3, 32, 32)
    return (lambda x: upstream(x)[0]), adapt_with(Adapter(), upstream), torch.randn(2, 6, 4)


def second(f, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x)[0, 0], x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def forward_mode(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def in_inference_mode(f, x):
    with torch.inference_mode():
        return f(x)


REVERSE = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x)[0, 0])(x),
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x)[0, :2])(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(2, 5))[0],
    "vmap": lambda f, x: torch.vmap(lambda one: f(one[None])[0])(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda one: f(one[None])[0, 0]))(x),
    "inference mode": in_inference_mode,
}
SECOND = {
    "hvp": lambda f, x: torch.autograd.functional.hvp(lambda x: f(x)[0, 0], x, torch.ones_like(x))[1],
    "second derivatives": second,
}
BEYOND = {  # what fused kernels lack
    "hessian": lambda f, x: torch.func.hessian(lambda size: f(size * x)[0, 0])(torch.tensor(1.0)),
    "jacrev of grad": lambda f, x: torch.func.jacrev(
        torch.func.grad(lambda size: f(size * x)[0, 0]),
    )(torch.tensor(1.0)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda size: f(size * x))(torch.tensor(1.0)),
    "forward mode": forward_mode,
}


def edited(model, x):
    return model.run_with_hooks(x, hooks={"*.hook_resid_mid": lambda a, at: a + a.tanh()})


@pytest.mark.parametrize("kind", REVERSE | SECOND | BEYOND)
def test_as_upstream(pair, kind):
    upstream, model, x = pair
    take = (REVERSE | SECOND | BEYOND)[kind]
    with contextlib.nullcontext() if kind in REVERSE else sdpa_kernel(SDPBackend.MATH):
        expected = take(upstream, x)
    torch.testing.assert_close(take(model, x), expected, **CLOSE)
    hooked = take(lambda x: edited(model, x), x)
    again = take(lambda x: model.run_with_cache(x, hooks={"*.hook_resid_mid": lambda a, at: a + a.tanh()})[0], x)
    torch.testing.assert_close(hooked, again, **CLOSE)
    assert not torch.allclose(hooked, expected)


HIERA = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1), "img_size": 64, "num_classes": 5}


@pytest.mark.parametrize("kind", SECOND | BEYOND)
def test_derivatives_through_upstreams_own_fused_kernel(kind):
    model = prisma.adapt(timm.create_model("hiera_tiny_224", pretrained=False, **HIERA).eval())
    x, take = torch.randn(1, 3, 64, 64), (SECOND | BEYOND)[kind]
    with sdpa_kernel(SDPBackend.MATH):
        expected = take(model, x)
    if kind in BEYOND:
        torch.testing.assert_close(take(model, x), expected, **CLOSE)
        return
    with pytest.raises(InputError, match=r"sdpa_kernel\(torch\.nn\.attention\.SDPBackend\.MATH\)"):
        take(model, x)
    x.requires_grad_()
    (first,) = torch.autograd.grad(model(x)[0, 0], x, create_graph=True)  # the first alone is no error
    assert torch.equal(first, torch.autograd.grad(model(x)[0, 0], x)[0])


@pytest.mark.parametrize("bias", [None, "given", "trained"])
def test_derivatives_of_the_fused_kernel_of_every_order(bias):
    inputs = [torch.randn(2, 2, 3, 4, requires_grad=True) for _ in range(3)]
    if bias is not None:
        inputs.append(torch.randn(1, 2, 3, 3, requires_grad=bias == "trained"))

    def attention(*inputs):
        return fused_attention(*inputs[:3], inputs[3] if bias else None, 0.3)

    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradgradcheck(attention, inputs)
    grads = []
    for context in (contextlib.nullcontext(), sdpa_kernel(SDPBackend.MATH)):
        with context:
            last = attention(*inputs).pow(3).sum()
            for _ in range(3):
                last = torch.autograd.grad(last, inputs[0], create_graph=True)[0].square().sum()
        grads.append(last)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=0)


def gradient(model, x):
    _, cache = model.run_with_cache(x, names="resid_post", loss=lambda logits: logits[0, 0])
    return cache.grad["resid_post", 0]


def test_what_is_made_in_inference_mode_takes_gradients_outside():
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        upstream = vit()
        loaded = prisma.load("timm:vit_tiny_patch16_224", pretrained=False, **SMALL)
        adapted, shared = prisma.adapt(upstream), prisma.adapt(upstream, copy=False)
        hooked, image = adapt_with(Adapter(), Upstream().eval()), torch.randn(1, 3, 32, 32)
    expected = gradient(prisma.adapt(upstream), x)
    assert torch.equal(gradient(adapted, x), expected)
    assert gradient(loaded, x).any()
    hooked(torch.randn(2, 6, 4)).sum().backward()
    assert torch.equal(shared(x), adapted(x))
    for model, bad in ((shared, x), (adapted, image)):
        with pytest.raises(InputError, match=r"torch\.inference_mode\(\).*x\.clone\(\)"):
            gradient(model, bad)
    with torch.no_grad():
        assert adapted(image).isfinite().all()


def asked(cache):
    """Every way to ask a cache for what is in it."""
    return {
        "an item": lambda: cache["blocks.0.hook_resid_post"],
        "values": lambda: list(cache.values()),
        "dict": lambda: dict(cache),
        "to": lambda: cache.to(dtype=torch.float32),
        "save": lambda: cache.save("cache.safetensors"),
    }


@pytest.mark.parametrize("how", ["inside", "around"])
def test_what_was_cached_inside_vmap_and_kept_is_refused_in_words(pair, how):
    _, model, x = pair
    kept = []

    def run(one):
        logits, cache = model.run_with_cache(one[None])
        assert repr(cache)
        kept.append(cache)
        return logits[0], dict(cache)

    if how == "inside":
        _, inside = torch.vmap(run)(x)
        _, cache = model.run_with_cache(x)
        for name in cache:  # what is returned is all inputs'
            torch.testing.assert_close(inside[name][:, 0], cache[name], **CLOSE)
    else:
        with model.caching() as cache:
            torch.vmap(lambda one: model(one[None])[0])(x)
        kept.append(cache)
    assert repr(kept[0])
    for ask in asked(kept[0]).values():
        with pytest.raises(InputError, match=r"torch\.vmap"):
            ask()


@pytest.mark.parametrize("how", ["a loss", "a backward hook"])
def test_gradients_by_activations_are_taken_inside_the_transform_that_takes_gradients(pair, how):
    _, model, x = pair
    name, grads = next(name for name in model.hook_points() if name.endswith("resid_mid")), []

    def run(x):
        if how == "a loss":
            return model.run_with_cache(x, names=name, loss=lambda logits: logits[0, 0])[0][0, 0]
        return model.run_with_hooks(x, backward={name: lambda grad, at: grads.append(grad)})[0, 0]

    expected = torch.autograd.grad(run(x := x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(run)(x.detach()), expected, **CLOSE)
    model.requires_grad_(False)
    for transform in (
        lambda: torch.vmap(lambda one: run(one[None]))(x.detach()),
        lambda: torch.func.jvp(run, (x,), (x,)),
    ):
        with pytest.raises(HookError, match=r"torch\.func\.grad inside torch\.vmap"):
            transform()


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_a_cache_around_a_transform_is_that_of_a_plain_pass(pair, transform):
    _, model, x = pair
    _, expected = model.run_with_cache(x)
    with model.caching() as cache:
        if transform == "grad":
            torch.func.grad(lambda x: model(x)[0, 0])(x)
        else:
            torch.func.jvp(model, (x,), (x,))
    for name in expected:
        assert not cache[name].requires_grad
        torch.testing.assert_close(cache[name], expected[name], **CLOSE)
