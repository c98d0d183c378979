"""What records a forward pass, or runs it without numbers: as upstream's model."""

from __future__ import annotations

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import prisma_core as prisma
from prisma_core import HookError

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SMALL = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16},
}
pytestmark = [pytest.mark.usefixtures("in_float64"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(params=SMALL)
def pair(request, in_float64):
    torch.manual_seed(0)
    upstream = timm.create_model(request.param, pretrained=False, num_classes=5, **SMALL[request.param]).eval()
    for parameter in upstream.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = prisma.adapt(upstream)
    return upstream, model, model.sample_inputs(2)[0].double()


def edited(model):
    return lambda x: model.run_with_hooks(x, hooks={"*.hook_resid_mid": lambda a, at: a + a.tanh()})


class Asking(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return edited(self.model)(x)


def linear(f, x):
    output, tangent = torch.func.linearize(f, x)
    return torch.stack([output, tangent(torch.ones_like(x))])


WAYS = {
    "make_fx": lambda f, x: make_fx(f)(x)(x),
    "jit.trace": lambda f, x: torch.jit.trace(f, x)(x),
    "export": lambda f, x: torch.export.export(f, (x,)).module()(x),
    "linearize": linear,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_numbers(pair, way):
    upstream, model, x = pair
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = WAYS[way](upstream, x)
    torch.testing.assert_close(WAYS[way](model, x), expected, **CLOSE)


@pytest.mark.parametrize("pair", ["vit_tiny_patch16_224"], indirect=True)
@pytest.mark.parametrize("strict", [True, False])
def test_export_in_a_scope_and_of_what_opens_one(pair, strict):
    """The scope around is in the graph; one inside is a sentence where torch reads code, and works where it runs it."""
    _, model, x = pair
    plain, expected, around = model(x), edited(model)(x), {"*.hook_resid_mid": lambda a, at: a + a.tanh()}
    with model.hooks(around):
        exported = torch.export.export(model, (x,), strict=strict).module()
    torch.testing.assert_close(exported(x), expected, **CLOSE)
    torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), plain, **CLOSE)
    inside = Asking(model)
    if strict:
        with pytest.raises((HookError, torch._dynamo.exc.Unsupported), match="open the scope around it"):
            torch.export.export(inside, (x,), strict=True)
    else:
        torch.testing.assert_close(torch.export.export(inside, (x,), strict=False).module()(x), expected, **CLOSE)


def test_hooks_are_recorded(pair):
    _, model, x = pair
    torch.testing.assert_close(make_fx(edited(model))(x)(x), edited(model)(x), **CLOSE)


def test_a_pass_without_numbers(pair):
    upstream, model, x = pair
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(x.shape)
        for run in (model, edited(model), lambda image: model.run_with_cache(image)[0]):
            assert run(image).shape == upstream(image).shape


def test_a_subclass_of_tensors_is_not_looked_at(pair):
    _, model, x = pair
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        image = mode.from_tensor(x)
    assert type(image) is not torch.Tensor
    assert model(image).shape == model(x).shape
