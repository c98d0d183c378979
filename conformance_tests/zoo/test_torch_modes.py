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
from prisma_core import InputError
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
FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda size: f(size * x))(torch.tensor(1.0)),
    "forward mode": forward_mode,
}
FUSED_LACKS = FORWARD | {"second derivatives": second}


def edited(model, x):
    return model.run_with_hooks(x, hooks={"*.hook_resid_mid": lambda a, at: a + a.tanh()})


@pytest.mark.parametrize("kind", REVERSE | FUSED_LACKS)
def test_as_upstream(pair, kind):
    upstream, model, x = pair
    take = (REVERSE | FUSED_LACKS)[kind]
    with sdpa_kernel(SDPBackend.MATH) if kind in FUSED_LACKS else contextlib.nullcontext():
        torch.testing.assert_close(take(model, x), take(upstream, x), **CLOSE)
        hooked = take(lambda x: edited(model, x), x)
        again = take(lambda x: model.run_with_cache(x, hooks={"*.hook_resid_mid": lambda a, at: a + a.tanh()})[0], x)
    torch.testing.assert_close(hooked, again, **CLOSE)
    assert not torch.allclose(hooked, take(upstream, x) if kind in REVERSE else hooked * 0)


@pytest.mark.parametrize("kind", FORWARD)
def test_forward_mode_through_the_fused_kernel_says_what_to_do(kind):
    model = prisma.adapt(vit())
    with pytest.raises(InputError, match=r"sdpa_kernel\(torch\.nn\.attention\.SDPBackend\.MATH\)"):
        FORWARD[kind](model, torch.randn(2, 3, 32, 32))


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
