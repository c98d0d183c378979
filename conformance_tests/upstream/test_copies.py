"""Functions set on an upstream's modules are those of its copy, however they hold a module; or they are refused."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from prisma_conformance.subject import Subject
from third_party import Attention, Mapped, drawn, image
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.plugin import Case, HookMap, Reader
from prisma_core.upstream.copies import copy_module

NAMED: Any = None  # what a notebook calls by its global name
CALLS = SimpleNamespace(old=None)
PATHS = ["layers.0", "layers.0.attn.qkv", "embed", ""]


class Within(Mapped):
    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return HookMap.parse("layers.0.attn.qkv -> blocks.0.attn.hook_q : batch pos d_qkv")


def closure(module: Any) -> None:
    old = module.forward
    module.forward = lambda x: old(x) * 2 + 1


def default(module: Any) -> None:
    def new(x: Tensor, old: Any = module.forward) -> Tensor:
        return old(x) * 2 + 1

    module.forward = new


def keyword(module: Any) -> None:
    def new(x: Tensor, *, old: Any = module.forward) -> Tensor:
        return old(x) * 2 + 1

    module.forward = new


def partial(module: Any) -> None:
    module.forward = functools.partial(lambda old, x: old(x) * 2 + 1, module.forward)


def partial_of_a_closure(module: Any) -> None:
    closure(module)
    module.forward = functools.partial(module.forward)


def method(module: Any) -> None:
    def new(self: nn.Module, x: Tensor) -> Tensor:
        return type(self).forward(self, x) * 2 + 1

    module.forward = types.MethodType(new, module)


def method_that_closes_over(module: Any) -> None:
    old = module.forward

    def new(self: nn.Module, x: Tensor) -> Tensor:
        return old(x) * 2 + 1

    module.forward = types.MethodType(new, module)


def wrapper(module: Any) -> None:
    old = module.forward

    @functools.wraps(old)
    def new(x: Tensor) -> Tensor:
        return new.__wrapped__(x) * 2 + 1  # type: ignore[attr-defined]

    module.forward = new


def table(module: Any) -> None:
    calls = {"old": [module.forward]}
    module.forward = lambda x: calls["old"][0](x) * 2 + 1


class Twice:
    def __init__(self, old: Any):
        self.old = old

    def __call__(self, x: Tensor) -> Tensor:
        return self.old(x) * 2 + 1


def thing(module: Any) -> None:
    module.forward = Twice(module.forward)


def method_of_a_thing(module: Any) -> None:
    module.forward = Twice(module.forward).__call__


def mocked(module: Any) -> None:
    old = module.forward
    module.forward = mock.Mock(wraps=lambda x: old(x) * 2 + 1)


def attribute(module: Any) -> None:
    module.old = module.forward
    module.forward = lambda x: module.old(x) * 2 + 1


def hook(module: Any) -> None:
    module.register_forward_hook(lambda part, args, result: result * 2 + 1 if part is module else 0)


KEPT = [
    closure,
    default,
    keyword,
    partial,
    partial_of_a_closure,
    method,
    method_that_closes_over,
    wrapper,
    table,
    thing,
]
KEPT += [method_of_a_thing, mocked, attribute, hook]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("patch", KEPT)
def test_they_are_the_copy_s(patch: Callable[[Any], None], path: str) -> None:
    net, x = drawn(), image()
    patch(net.get_submodule(path))
    model = prisma.adapt(net, adapter=Within())
    with torch.no_grad():
        assert torch.equal(model(x), net(x))
        _, cache = model.run_with_cache(x)
        assert list(cache) == ["blocks.0.attn.hook_q"]  # inside the part, and so of the copy
        for weight in model.parameters():
            weight.mul_(1.5)
        after = model(x)
        assert not torch.equal(after, net(x))
        for weight in net.parameters():
            weight.mul_(1.5)
        assert torch.equal(after, net(x))


def by_global_name(module: Any) -> None:
    global NAMED
    NAMED = module.forward
    module.forward = lambda x: NAMED(x) * 2


def in_a_hook(module: Any) -> None:
    global NAMED
    NAMED = {module: 2}
    module.register_forward_hook(lambda part, args, result: result * NAMED.get(part, 1))


def by_another_function(module: Any) -> None:
    global NAMED
    old = module.forward
    NAMED = lambda x: old(x) * 2  # noqa: E731
    module.forward = functools.partial(lambda x: NAMED(x))


def in_an_object_of_the_file(module: Any) -> None:
    CALLS.old = module.forward
    module.forward = lambda x: CALLS.old(x) * 2


class Holder:
    old: Any = None


def in_a_class_of_the_file(module: Any) -> None:
    Holder.old = module.forward
    module.forward = lambda x: Holder.old(x) * 2


def compiled(module: Any) -> None:
    old = module.forward
    module._compiled_call_impl = lambda x: old(x) * 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "patch",
    [
        by_global_name,
        in_a_hook,
        by_another_function,
        in_an_object_of_the_file,
        in_a_class_of_the_file,
        compiled,
    ],
)
def test_what_a_copy_would_not_follow_is_refused(patch: Callable[[Any], None], path: str) -> None:
    net = drawn()
    patch(net.get_submodule(path))
    with pytest.raises(UnsupportedArchitecture, match=rf"{patch.__name__}\.<locals>\.<lambda>.* the copy|copied from"):
        prisma.adapt(net, adapter=Within())


def test_a_function_of_a_class_that_holds_a_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, old = drawn(), Attention.forward
    special = net.layers[0].attn
    monkeypatch.setattr(Attention, "forward", lambda self, x: old(self, x) * (2 if self is special else 1))
    with pytest.raises(UnsupportedArchitecture, match="set on a class, which holds a module"):
        prisma.adapt(net, adapter=Within())
    other = drawn()
    with torch.no_grad():
        assert torch.equal(prisma.adapt(other, adapter=Within())(image()), other(image()))  # holds none of its modules


@pytest.mark.parametrize("patch", [closure, hook])
def test_they_are_those_of_the_kit_s_copies(patch: Callable[[Any], None]) -> None:
    net, x = drawn(), image()
    patch(net.layers[0])
    subject = Subject(Case("net", lambda: net), Within(), net)  # with weights of its own
    upstream, model = subject.pair()
    with torch.no_grad():
        assert torch.equal(model(x), upstream(x))
        before = upstream(x)
        for weight in net.layers[0].parameters():
            weight.mul_(1.5)
        assert torch.equal(upstream(x), before)


def test_what_holds_no_module_is_shared() -> None:
    """So that a hook's list is the user's, and a counter counts all passes."""
    net, seen, calls = drawn(), list[Tensor](), 0

    def keep(part: nn.Module, args: Any, result: Tensor) -> None:
        nonlocal calls
        assert part is not net
        calls += 1
        seen.append(result)

    net.norm.register_forward_hook(keep)
    copied = copy_module(net, copy=False)
    copied(image())
    net(image())
    assert calls == 2
    assert torch.equal(*seen)


def test_an_opaque_stem_is_copied_with_its_functions() -> None:
    timm = pytest.importorskip("timm")
    upstream = timm.create_model("vit_tiny_r_s16_p8_224", pretrained=False, img_size=64, depth=1, num_classes=3).eval()
    stem = upstream.patch_embed.backbone
    closure(stem)
    x = torch.randn(1, 3, 64, 64)
    model = prisma.adapt(upstream)
    with torch.no_grad():
        torch.testing.assert_close(model(x), upstream(x))
        for weight in stem.parameters():
            weight.mul_(3)  # of upstream's alone
        assert (model(x) - upstream(x)).abs().max() > 1e-4
    by_global_name(stem)
    with pytest.raises(UnsupportedArchitecture, match="global name 'NAMED'"):
        prisma.adapt(upstream)
