"""Functions in the place of a library's own are refused, wherever the call of a module reaches them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any
from unittest import mock

import pytest
import third_party
import torch
from third_party import Attention, Block, Mapped, Net, Plain, drawn, image
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.plugin import Adapter

Patch = Callable[[Net, pytest.MonkeyPatch], object]


def error(net: nn.Module, adapter: Adapter | None = None) -> float:
    x = image()
    with torch.no_grad():
        return (prisma.adapt(net, adapter=adapter or Plain())(x) - net(x)).abs().max().item()


def foreign(function: Callable[..., Any]) -> Any:
    """Return a function as if another package had defined it."""
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__, {**function.__globals__, "__name__": "acme.patches"}, "changed", None, function.__closure__
    )


def half(forward: Callable[..., Tensor]) -> Any:
    def changed(*args: Any) -> Tensor:
        return forward(*args) * 0.5

    return foreign(changed)


class Descriptor:
    def __init__(self, function: Any):
        self.function = function

    def __get__(self, module: Any, kind: Any = None) -> Any:
        return lambda *args: self.function(module, *args)


Descriptor.__module__ = "acme.patches"


def on_class(name: str, wrap: Callable[[Any], Any], kind: type = Attention) -> Patch:
    return lambda net, patch: patch.setattr(kind, name, wrap(half(getattr(kind, name))))


def on_instance(name: str) -> Patch:
    def patch(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
        part: Any = net.layers[0]
        setattr(part, name, half(getattr(part, name)))

    return patch


def in_a_module_of_torch(net: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.functional, "scaled_dot_product_attention", foreign(lambda q, k, v, **how: v))


def in_the_library_s_module(net: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(third_party, "residual", half(third_party.residual))


def of_the_library_s_other_class(net: Net, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Block, "forward", third_party.Sequel.forward)


def of_reading_attributes(kind: type) -> Patch:
    def half_of_tensors(self: nn.Module, name: str) -> Any:
        value = nn.Module.__getattr__(self, name)
        return value * 0.5 if isinstance(value, Tensor) else value

    return lambda net, patch: patch.setattr(kind, "__getattr__", foreign(half_of_tensors), raising=False)


def of_a_function(owner: Any, name: str, value: Any) -> Patch:
    return lambda net, patch: patch.setattr(owner, name, value)


def without_activation(net: Net, patch: pytest.MonkeyPatch) -> None:
    code = Block.mixed.__code__
    names = tuple("drop" if name == "act" else name for name in code.co_names)
    patch.setattr(Block.mixed, "__code__", code.replace(co_names=names))


def bare(self: Any, x: Tensor, other: bool = False) -> Tensor:
    return self.fc2(self.fc1(x))


PATCHES: dict[str, Patch] = {
    "a default of the library's function": of_a_function(third_party.residual, "__defaults__", (True,)),
    "a default by name": of_a_function(third_party.residual, "__kwdefaults__", {"twice": True}),
    "a default of a method": of_a_function(Block.mixed, "__defaults__", (True,)),
    "the code of a method": without_activation,
    "the code of a method, another file's": of_a_function(Block.mixed, "__code__", bare.__code__),
    "the code of a method, another method's": of_a_function(
        Block.forward, "__code__", third_party.Sequel.forward.__code__
    ),
    "how a class of torch's reads its tensors": of_reading_attributes(nn.Linear),
    "a class's forward": on_class("forward", lambda f: f),
    "a class's forward, as a partial method": on_class("forward", functools.partialmethod),
    "a class's forward, as a descriptor": on_class("forward", Descriptor),
    "a class's forward, wrapped in torch's": on_class("forward", torch.no_grad()),
    "a class's call": on_class("__call__", lambda f: f),
    "the call of all modules": on_class("__call__", lambda f: f, nn.Module),
    "a class's further method": on_class("mixed", lambda f: f, Block),
    "an instance's call": on_instance("_call_impl"),
    "an instance's further method": on_instance("mixed"),
    "torch.nn.functional": in_a_module_of_torch,
    "a function of the library": in_the_library_s_module,
    "a forward of the library's other class": of_the_library_s_other_class,
}


WORDS = r"acme\.patches|Sequel\.forward|a default of True|other code than its file|test_replaced"


@pytest.mark.parametrize("where", PATCHES)
def test_replaced_functions(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, before = drawn(), drawn()(image())
    assert error(net) < 1e-12
    with monkeypatch.context() as patch:
        PATCHES[where](net, patch)
        assert (net(image()) - before).abs().max() > 1e-3
        with pytest.raises(UnsupportedArchitecture, match=WORDS):
            error(net)
        if where != "the call of all modules":  # and so of the hooked model
            assert error(net, Mapped()) < 1e-12  # upstream's own code: kept


@contextmanager
def hooked(kind: str) -> Iterator[None]:
    def twice(module: nn.Module, values: Any, result: Any = None) -> Any:
        return None if not isinstance(module, Attention) else values[0] * 2 if result is None else result * 2

    handle = getattr(nn.modules.module, kind)(twice)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_global_hooks(kind: str) -> None:
    net, before = drawn(), drawn()(image())
    with hooked(kind):
        assert (net(image()) - before).abs().max() > 1e-3
        with pytest.raises(UnsupportedArchitecture, match=r"global forward .*twice"):
            error(net)
        assert error(net, Mapped()) < 1e-12
    assert error(net) < 1e-12


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_of_gradients(kind: str) -> None:
    net = drawn()
    handle = getattr(net.layers[1], kind)(lambda module, *gradients: tuple(g * 2 for g in gradients[0]))
    with pytest.raises(UnsupportedArchitecture, match=r"backward .*gradients"):
        error(net)
    x = image().requires_grad_()
    (theirs,) = torch.autograd.grad(net(x).sum(), x)
    (ours,) = torch.autograd.grad(prisma.adapt(net, adapter=Mapped())(x).sum(), x)
    torch.testing.assert_close(ours, theirs)
    handle.remove()
    (plain,) = torch.autograd.grad(prisma.adapt(net, adapter=Plain())(x).sum(), x)
    assert (plain - theirs).abs().max() > 1e-3


class Doubled(Tensor):
    """A weight that is twice what it holds, as a quantised one is more than its codes."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.as_subclass(Tensor) * 2, bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_of_a_class_of_their_own() -> None:
    net, before = drawn(), drawn()(image())
    weight = net.head.weight.detach().as_subclass(Doubled)
    net.head.weight = nn.Parameter(weight, requires_grad=False)
    assert (net(image()) - before).abs().max() > 1e-3
    with pytest.raises(UnsupportedArchitecture, match=r"'head'.*weight is a .*Doubled"):
        error(net)


@pytest.mark.parametrize("stage", [nn.Tanh, nn.Softplus, nn.Flatten, lambda: nn.Sequential(nn.Sigmoid())])
def test_a_module_of_torch_s_where_there_was_dropout(stage: Callable[[], nn.Module]) -> None:
    net = drawn()
    assert isinstance(net.layers[0].drop, nn.Dropout)
    net.layers[0].drop = stage()
    with pytest.raises(UnsupportedArchitecture, match=r"'layers\.0\.drop.*expect"):
        error(net)


def test_classes_of_the_library_s_other_files() -> None:
    net = drawn()
    net.layers[0].attn.__class__ = type("Attention", (nn.Module,), {**vars(Attention), "__module__": "acme.other"})
    with pytest.raises(
        UnsupportedArchitecture, match=r"'layers\.0\.attn'.*another file.*expect\('acme\.other\.Attention'\)"
    ):
        error(net)


@pytest.mark.parametrize("wrap", [lambda net: torch.compile(net, backend="eager"), nn.DataParallel])
def test_wrappers_around_a_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = drawn()
    wrapped = wrap(net)
    assert error(wrapped) < 1e-12
    wrapped.register_forward_hook(lambda module, args, result: result * 2)
    with pytest.raises(prisma.PrismaError):
        error(wrapped)


def test_methods_that_are_the_class_s_own() -> None:
    net = drawn()
    part: Any = net.layers[0]
    part.mixed = MethodType(Block.mixed, part)
    part.named = lambda: "no method of the class"
    assert error(net) < 1e-12


def code_exchanged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.GELU.forward, "__code__", (lambda self, x: x * 2).__code__)


def source_edited(patch: pytest.MonkeyPatch) -> None:
    """As notebooks do: the library's text, changed and run in the library's own module."""
    home = vars(nn.modules.activation)
    patch.setitem(home, "forward", None)
    exec("def forward(self, input): return input * 2", home)
    home["forward"].__qualname__ = "GELU.forward"
    patch.setattr(nn.GELU, "forward", home["forward"])


def forward_of_another_class(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.GELU, "forward", nn.SiLU.forward)
    patch.setattr(nn.GELU, "inplace", False, raising=False)


def mocked(patch: pytest.MonkeyPatch) -> None:
    double = mock.create_autospec(nn.GELU.forward, side_effect=lambda self, x: x * 2)
    patch.setattr(nn.GELU, "forward", double)


@pytest.mark.parametrize("patched", [code_exchanged, source_edited, forward_of_another_class, mocked])
def test_other_code_under_a_function_s_own_name(
    patched: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, before = drawn(), drawn()(image())
    with monkeypatch.context() as patch:
        patched(patch)
        assert (net(image()) - before).abs().max() > 1e-3
        with pytest.raises(UnsupportedArchitecture, match=r"GELU at 'layers\.0\.act'.*not its class's own"):
            error(net)
    assert error(net) < 1e-12


@pytest.mark.parametrize(("path", "name"), [("layers.0", "fc1"), ("", "head"), ("layers.0.fc1", "weight")])
def test_an_attribute_in_the_place_of_a_part(path: str, name: str) -> None:
    net, before = drawn(), drawn()(image())
    module = net.get_submodule(path)
    part = getattr(module, name)
    vars(module)[name] = part * 2 if isinstance(part, Tensor) else lambda x: part(x) * 2
    assert (net(image()) - before).abs().max() > 1e-3
    with pytest.raises(UnsupportedArchitecture, match=rf"del module\.{name}"):
        error(net)
