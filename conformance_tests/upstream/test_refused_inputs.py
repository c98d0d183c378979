"""Inputs that a hooked upstream refuses, and parts that only a canonical model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from windows import WIDTH

from prisma_core import (
    InputError,
    NotApplicable,
)
from prisma_core.maps.places import HookMap
from prisma_core.spec import MapSpec
from prisma_core.upstream.model import HookedUpstream

pytestmark = pytest.mark.usefixtures("in_float64")


class Painter(nn.Module):
    """Takes images of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 2, stride=2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


@pytest.fixture
def painter() -> HookedUpstream:
    rows = "conv -> hook_embed : batch d_model row column\nhead -> hook_logits : batch class"
    return HookedUpstream(Painter(), HookMap.parse(rows), MapSpec(shape=(3, 4, 4)), lambda result: result)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(3, 4, 4), r"\[batch 3 4 4\], got shape \[3, 4, 4\]. Add a batch axis: image\[None\]"),
        (torch.zeros(2, 4), r"got shape \[2, 4\]"),
        (torch.zeros(1, 1, 4, 4), "Expected 3 channels"),
        (torch.zeros(1, 3, 6, 4), r"\[batch 3 4 4\], got shape \[1, 3, 6, 4\], on which upstream's code failed"),
        ("cat.jpg", "got 'cat.jpg'. model.preprocess makes one"),
        (None, "got None. model"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float16), "in torch.float64.*it is in torch.float16"),
        (torch.zeros(1, 3, 4, 4, device="meta"), "on cpu, where the model is; it is on meta"),
        (torch.full((1, 3, 4, 4), torch.nan), "48 values that are NaN"),
        (torch.zeros(1, 3, 4, 4).to_sparse(), "a dense tensor.*a sparse one"),
        (torch.nested.nested_tensor([torch.zeros(3, 4, 4)]), "a dense tensor.*a nested one"),
    ],
)
def test_inputs_are_refused_in_words(painter: HookedUpstream, given: Any, said: str) -> None:
    given = given.double() if isinstance(given, Tensor) and given.dtype == torch.float32 else given
    with pytest.raises(InputError, match=said):
        painter(given)
    with pytest.raises(InputError, match=said):
        painter.run_with_cache(given, names="logits", output=False)


def test_there_is_no_layer_to_start_at_and_no_layout(painter: HookedUpstream) -> None:
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(InputError, match="takes no 'start_at_layer'"):
        painter(x, start_at_layer=1)
    with pytest.raises(InputError, match="takes no 'stop_at_layer'"):
        painter.run_with_cache(x, stop_at_layer=1)
    with pytest.raises(InputError, match="takes no 'mask'"):
        painter(x, mask=x)
    assert painter.layout is None
    assert torch.equal(painter(x=x), painter(x))


def test_positions_and_heads_that_nothing_asked_for_has(model: HookedUpstream, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"heads= chooses along the axis 'head', and nothing asked for has one: it is"):
        model.run_with_cache(x, names="resid_post", heads=[0])
    with pytest.raises(InputError, match="pos= chooses along"), model.caching("logits", pos=0):
        pass
    _, cache = model.run_with_cache(x, names=["resid_post", "z"], heads=[0])
    assert cache["z", 0].shape[-2] == 1  # and what has no heads is kept whole
    assert cache["resid_post", 0].shape == (2, 6, WIDTH)


def test_decompositions_say_that_there_is_no_canonical_form(model: HookedUpstream, x: Tensor) -> None:
    _, cache = model.run_with_cache(x)
    with pytest.raises(NotApplicable, match="need a canonical form, and this model"):
        cache.decompose_resid()


def test_weights_that_are_not_there_are_explained_and_parts_have_numbers(model: HookedUpstream) -> None:
    first = model.blocks[0]
    assert first.attn.hook_z is model.hook_points()["blocks.0.attn.hook_z"]
    assert [part is model.get_submodule(f"blocks.{n}") for n, part in enumerate(model.blocks)] == [True] * 2
    assert model.blocks[-1] is model.get_submodule("blocks.1")
    with pytest.raises(AttributeError, match=r"no attribute 'W_Q': a model without canonical form.*model\.upstream"):
        _ = first.attn.W_Q
    with pytest.raises(AttributeError, match=r"no attribute 'stages'.*Here there are .*blocks"):
        _ = model.stages
    with pytest.raises(AttributeError, match=r"model\.spec"):
        _ = model.cfg
    with pytest.raises(IndexError, match="No part 2 here: there are 0, 1"):
        _ = model.blocks[2]
