"""Exported and traced graphs hold the edits that were open around them, and nothing of Prisma's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from functorch.compile import aot_module, nop
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import prisma_core as prisma
from prisma_core import HookError, NotApplicable

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def halve(x: Tensor, at: object) -> Tensor:
    return x / 2


EXPORTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "decomposed": lambda model, x: torch.export.export(model, (x,)).run_decompositions().module(),
}
TRACES: dict[str, Callable[[Any, Tensor], Any]] = {
    "jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, fake": lambda model, x: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
}


def ran(model: Any, x: Tensor, hooks: Any, make: Callable[[Any, Tensor], Any]) -> tuple[Any, Tensor]:
    with torch.no_grad(), model.hooks(hooks):
        graph = make(model, x)
    return graph, graph(x)


@pytest.mark.parametrize("how", EXPORTS | TRACES)
@pytest.mark.parametrize("name", [None, "z", "pattern", "resid_post"])
def test_an_open_edit_is_in_the_graph(make: Any, image: Tensor, how: str, name: str | None) -> None:
    model = make(layers=1).requires_grad_(False)
    hooks = {name: halve} if name else {}
    plain, expected = model(image), model.run_with_hooks(image, hooks=hooks)
    graph, output = ran(model, image, hooks, (EXPORTS | TRACES)[how])
    torch.testing.assert_close(output, expected, **CLOSE)
    assert bool(hooks) == ((expected - plain).abs().max() > 1e-6)
    assert "prisma" not in str(getattr(graph, "code", ""))  # whoever reads the graph has not to know Prisma
    torch.testing.assert_close(model(image), plain, **CLOSE)


@pytest.fixture
def swin() -> tuple[Any, Tensor]:
    small: dict[str, Any] = {"img_size": 32, "window_size": 4, "depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)}
    torch.manual_seed(0)
    model: Any = prisma.adapt(timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, **small))
    return model.requires_grad_(False), model.sample_inputs(2, generator=torch.Generator().manual_seed(1))[0]


def test_hooked_upstreams_hold_the_edit_or_refuse(swin: tuple[Any, Tensor]) -> None:
    model, x = swin
    expected = model.run_with_hooks(x, hooks={"*hook_z": halve})
    assert (expected - model(x)).abs().max() > 1e-6
    for make in TRACES.values():
        assert torch.equal(ran(model, x, {"*hook_z": halve}, make)[1], expected)
        assert torch.equal(ran(model, x, {}, make)[1], model(x))
    for make in EXPORTS.values():
        torch.testing.assert_close(ran(model, x, {}, make)[1], model(x))
        with pytest.raises((HookError, torch._dynamo.exc.Unsupported), match="run it eagerly"):
            ran(model, x, {"*hook_z": halve}, make)


def test_aot_autograd(make: Any, image: Tensor) -> None:
    model = make(layers=1)
    with model.hooks({"z": halve}):
        made = aot_module(model, nop)(image)
        expected = model(image)
    torch.testing.assert_close(made, expected, **CLOSE)
    by_hand, by_graph = (torch.autograd.grad(y.square().sum(), model.embed.proj.weight) for y in (expected, made))
    torch.testing.assert_close(by_graph, by_hand, **CLOSE)


def test_torch_script_is_refused_in_words(make: Any, swin: tuple[Any, Tensor]) -> None:
    for model in (make(layers=1), swin[0]):
        with pytest.raises(NotApplicable, match=r"torch\.jit\.script.*torch\.export\.export.*torch\.jit\.trace"):
            torch.jit.script(model)
