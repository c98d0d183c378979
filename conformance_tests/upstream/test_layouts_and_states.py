"""Hooked upstreams: the layout of each input, the memory layout of what hooks return, and states as files hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prisma_conformance.recording import Recorder
from torch import nn

from prisma_core import TokenLayout, UnsupportedArchitecture
from prisma_core.plugin import HookMap, MapAdapter, MapSpec, Place, Reader
from prisma_core.upstream.model import HookedUpstream
from prisma_core.upstream.model import _laid_out_as as laid_out_as
from prisma_core.zoo import adapt_with

LAYOUT = TokenLayout(rows=2, columns=3)


class Patches(nn.Module):
    """Patches of an image, squashed once by the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 4, stride=4)
        self.turned = nn.Parameter(torch.randn(5, 3).T)

    def forward(self, image: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.stem(image).flatten(2).transpose(1, 2).tanh() @ self.turned.T


class PatchesAdapter(MapAdapter):
    types = (f"{__name__}.Patches",)

    def __init__(self, **facts: Any):
        self.facts = facts

    def spec(self, upstream: Reader) -> MapSpec:
        return MapSpec(shape=(1, 8, 12), **self.facts)

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return HookMap.parse("stem -> hook_embed : batch d_model row column")


def model(**facts: Any) -> HookedUpstream:
    hooked = adapt_with(PatchesAdapter(**facts), Patches())
    assert isinstance(hooked, HookedUpstream)
    return hooked


def test_the_layout_is_that_of_the_input() -> None:
    native, other = torch.zeros(2, 1, 8, 12), torch.zeros(2, 1, 16, 12)
    many = model(layout=LAYOUT, sizes=((16, 12),))
    assert many.layout_for() == LAYOUT
    assert many.layout_for(native) == LAYOUT
    assert many.layout_for(other) == TokenLayout(rows=4, columns=3)
    for inputs in ((native, native), ([native],), (native[0],)):
        assert many.layout_for(*inputs) is None
    assert model(layout=LAYOUT).layout_for(native) == LAYOUT
    assert model(layout=LAYOUT).layout_for(other) is None
    assert model().layout_for(native) is None
    assert model().layout_for() is None


def test_what_a_hook_returns_lies_in_memory_as_upstreams_did() -> None:
    last = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    y = torch.randn(2, 3, 4, 5)
    copy = laid_out_as(y, last)
    assert torch.equal(copy, y)
    assert copy.stride() == last.stride()
    assert copy.data_ptr() != y.data_ptr()
    for expanded in (torch.randn(2, 1, 4, 5).expand(2, 3, 4, 5), torch.randn(1, 3, 4, 5).expand(2, 3, 4, 5)):
        copy = laid_out_as(y, expanded)
        copy[0] = 0  # each number has a place of its own
        assert torch.equal(copy[1], y[1])


def test_a_state_is_exported_as_files_hold_it() -> None:
    hooked = model()
    assert not hooked.upstream.turned.is_contiguous()
    state = hooked.export()
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    assert torch.equal(state["turned"], hooked.upstream.turned)


def test_a_hook_map_alone_makes_no_weights() -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"Patches is not supported: no weight map: it has no canonical"):
        PatchesAdapter().weights(Reader(Patches()), None)


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("part", ["", "stem"])
def test_functions_that_hooks_call_are_not_the_modules(kind: str, part: str) -> None:
    upstream, image = Patches(), torch.randn(2, 1, 8, 12)
    expected = upstream.stem(image).flatten(2).transpose(1, 2).tanh()
    module = upstream.get_submodule(part)

    def calls_the_function_too(*call: object) -> None:
        torch.ones(2, 6, 5).tanh()

    getattr(module, kind)(calls_the_function_too)
    place = Place.parse("@ tanh")
    with torch.no_grad(), Recorder(upstream, [place]) as tensors:
        upstream(image)
    assert torch.equal(tensors[place], expected)
