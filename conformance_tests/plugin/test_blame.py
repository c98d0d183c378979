"""Errors name the code of the plugin that raised them; adapters given by hand, and refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from networks import Network, NetworkAdapter, fails
from prisma_conformance.subject import unfused
from torch import nn

import prisma_core as prisma
from prisma_core import InputError, PluginError, UnknownName, UnsupportedArchitecture
from prisma_core.contract.adapter import Refusal
from prisma_core.errors import blaming, returned
from prisma_core.host import Host
from prisma_core.maps.reader import Reader
from prisma_core.spec import MapSpec
from prisma_core.zoo import adapt_with

Found = Callable[..., EntryPoint]


# ------------------------------------------------------------------ refusals


def test_a_refusal_names_the_module_and_the_feature(found: Found) -> None:
    refusal = Refusal(NetworkAdapter.types, "a body of its own; adapt(model.head) takes the head", "body")
    host = Host([found("refusing", prisma_adapters=lambda: [refusal])])
    assert host.types() == {}
    linear = r"torch\.nn\.modules\.linear\.Linear at 'body' is not supported: a body of its own; adapt"
    with pytest.raises(UnsupportedArchitecture, match=linear):
        host.adapter(Network())


def test_an_adapter_comes_before_a_refusal(found: Found) -> None:
    refusing = found("a", prisma_adapters=lambda: [Refusal(NetworkAdapter.types, "anything")])
    host = Host([refusing, found("b", prisma_adapters=lambda: [NetworkAdapter()])])
    assert isinstance(host.adapter(Network()), NetworkAdapter)
    assert [info.error for info in host.plugins()] == [None, None]


def test_a_refusal_whose_types_are_text(found: Found) -> None:
    host = Host([found("a", prisma_adapters=lambda: [Refusal("acme.Net", "anything")])])  # type: ignore[arg-type]
    assert (
        host.infos["a"].error == "prisma_adapters: Refusal.types is 'acme.Net'; expected a tuple: types = ('acme.Net',)"
    )


# ------------------------------------------------------------------ blame


def test_an_error_names_the_method_and_the_line() -> None:
    named = r"networks\.NetworkAdapter"
    with pytest.raises(PluginError, match=rf"{named}\.spec raised KeyError: 'heads' \(networks\.py, line \d+\)"):
        adapt_with(NetworkAdapter(spec=fails), Network())
    with pytest.raises(PluginError, match=rf"{named}\.hooks returned None; expected HookMap"):
        adapt_with(NetworkAdapter(hooks=lambda: None), Network())
    model = adapt_with(NetworkAdapter(output=fails), Network())
    with pytest.raises(PluginError, match=rf"{named}\.output raised KeyError: 'heads'"):
        model(torch.ones(1, 4))
    model = adapt_with(NetworkAdapter(output=dict), Network())
    with pytest.raises(PluginError, match=rf"{named}\.output returned a dict; expected Tensor"):
        model(torch.ones(1, 4))
    with (
        pytest.raises(PluginError, match=rf"{named}\.unfused_attention raised"),
        unfused(NetworkAdapter(unfused_attention=fails), Network()),
    ):
        raise AssertionError("never entered")


def test_what_happens_in_the_scope_is_not_the_adapters() -> None:
    left: list[str] = []

    @contextmanager
    def scope() -> Iterator[None]:
        try:
            yield
        finally:
            left.append("left")

    with pytest.raises(ZeroDivisionError), unfused(NetworkAdapter(unfused_attention=scope), Network()):
        raise ZeroDivisionError
    assert left == ["left"]


class Base:
    def inherited(self) -> None:
        raise KeyError("k")

    def deep(self) -> None:
        self.inherited()

    @functools.lru_cache  # noqa: B019  # a wrapper written in C, which has no frame
    def wrapped(self) -> None:
        raise KeyError("k")


class Derived(Base):
    pass


def test_the_outermost_method_of_the_object_is_named() -> None:
    for method in ("inherited", "deep", "wrapped"):
        with pytest.raises(PluginError, match=rf"Derived\.{method} raised KeyError: 'k' \("), blaming(one := Derived()):
            getattr(one, method)()
    with (
        pytest.raises(PluginError, match=r"\.Derived raised TypeError: .*inherited\(\) takes 1 positional"),
        blaming(one),
    ):
        one.inherited(3)  # type: ignore[call-arg]
    with pytest.raises(UnknownName, match="of Prisma"), blaming(one):
        raise UnknownName("of Prisma")
    assert returned(one.deep, 3, int) == 3


def _reads_layers(upstream: Reader) -> MapSpec:
    widths = [layer.width + upstream.head.out_features for layer in upstream.layers]
    return MapSpec(shape=(4,), n_classes=sum(widths))


@pytest.mark.parametrize(
    ("layers", "kind", "words"),
    [
        (lambda x: x, UnsupportedArchitecture, r"a function layers \(.*\)\. Put a module in its place before"),
        ([3], PluginError, r"'int' object has no attribute 'width' .*\. The last that it read: 'layers', \[3\]"),
        (None, PluginError, r"not iterable .*\. The last that it read: 'layers', None"),
        (torch.zeros(1), PluginError, r"'width' .*\. The last that it read: 'layers', a Tensor \[1\]"),
        (nn.ModuleList([nn.Linear(1, 1)]), UnsupportedArchitecture, r"Linear at 'layers\.0' .* no attribute 'width'"),
    ],
    ids=["function", "list", "None", "Tensor", "modules"],
)
@pytest.mark.parametrize("by", ["attribute", "__getattr__"])
def test_what_stands_in_the_place_of_blocks_is_named(layers: Any, kind: type, words: str, by: str) -> None:
    class Answering(Network):
        def __getattr__(self, name: str) -> Any:
            return layers if name == "layers" else super().__getattr__(name)

    class Layered(NetworkAdapter):
        def spec(self, upstream: Reader) -> Any:
            return _reads_layers(upstream)

    upstream = Answering() if by == "__getattr__" else Network()
    if by == "attribute":
        upstream.layers = layers
    with pytest.raises(kind, match=words):
        adapt_with(Layered(), upstream)


# ------------------------------------------------------------------ an adapter given by hand


def test_an_adapter_given_by_hand_needs_no_plugin(use: Callable[..., Host]) -> None:
    use()
    upstream, x = Network(), torch.randn(2, 4)
    with pytest.raises(UnsupportedArchitecture):
        prisma.adapt(upstream)
    model = prisma.adapt(upstream, adapter=NetworkAdapter())
    assert torch.equal(model(x), upstream(x)["logits"])


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (NetworkAdapter, "takes an Adapter, such as .*got the class NetworkAdapter"),
        ("timm", "got a str"),
        (Refusal(NetworkAdapter.types, "anything"), "got a Refusal"),
    ],
)
def test_what_is_no_adapter(adapter: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        prisma.adapt(Network(), adapter=adapter)


def test_an_adapter_of_another_type_is_refused() -> None:
    class Heir(Network):
        """Which may compute something else."""

    with pytest.raises(InputError, match=r"NetworkAdapter adapts .*\.Network; this model is a .*Heir"):
        prisma.adapt(Heir(), adapter=NetworkAdapter())


def test_code_that_leaves_the_process_is_an_error_that_names_it() -> None:
    with pytest.raises(PluginError, match="raised SystemExit: 3"), blaming(leaves, "acme.load"):
        leaves()


def leaves() -> None:
    raise SystemExit(3)
