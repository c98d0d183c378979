"""Interventions in models whose stream is a grid and whose attention has windows: the right places, or an error."""

from __future__ import annotations

import pytest
import torch
from prisma_patch import ablate, causal, knock_out, steer
from torch import Tensor, nn

from prisma_core import HookedUpstream, InputError, NotApplicable
from prisma_core.plugin import HookMap, MapSpec

NAME, SCORES, PATTERN = "blocks.0.hook_resid_post", "blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"
TABLE = f"""
stream -> {NAME} : batch row column d_model
scores -> {SCORES} : batch window head query_pos key_pos
pattern -> {PATTERN} : batch window head query_pos key_pos
head -> hook_logits : batch class
"""


class Windows(nn.Module):
    """A stream of 2 x 6 places, attention of 3 heads in one window of 2 x 2 out of each two columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 4)
        self.stream, self.scores, self.pattern = nn.Identity(), nn.Identity(), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(self.embed(x))
        each = x.unflatten(2, (3, 2)).transpose(1, 2).flatten(2, 3).unflatten(-1, (3, 2)).transpose(2, 3)
        read = self.pattern(self.scores(each @ each.transpose(-1, -2))) @ each
        return self.head(read.transpose(2, 3).flatten(-2).mean((1, 2)))


@pytest.fixture
def model() -> HookedUpstream:
    return HookedUpstream(Windows().eval(), HookMap.parse(TABLE), MapSpec(shape=(2, 6, 5)), lambda y: y)


@torch.no_grad()
def test_positions_of_a_grid_are_numbered_in_reading_order(model: HookedUpstream) -> None:
    x = torch.randn(2, 2, 6, 5)
    with ablate(model, NAME, pos=[1, 7]):
        _, cache = model.run_with_cache(x)
    with steer(model, NAME, torch.ones(6), 2.0, pos=8):
        _, steered = model.run_with_cache(x)
    _, clean = model.run_with_cache(x)
    zero = (cache[NAME] == 0).all(-1)
    assert zero[0].nonzero().tolist() == [[0, 1], [1, 1]]
    moved = (steered[NAME] - clean[NAME]).abs().amax(-1) > 1
    assert moved[1].nonzero().tolist() == [[1, 2]]
    with pytest.raises(InputError, match="No position"), ablate(model, NAME, pos=12):
        model(x)


@torch.no_grad()
def test_heads_are_heads_where_there_are_windows(model: HookedUpstream) -> None:
    x = torch.randn(2, 2, 6, 5)
    _, clean = model.run_with_cache(x)
    with causal(model, heads=[2]):
        _, cache = model.run_with_cache(x)
    upper = torch.ones(4, 4, dtype=torch.bool).triu(1)
    assert torch.equal(cache[PATTERN][:, :, :2], clean[PATTERN][:, :, :2])
    assert (cache[PATTERN][:, :, 2, upper] == 0).all()
    with pytest.raises(InputError, match="No position"), causal(model, heads=[3]):
        model(x)


def test_places_of_the_image_are_no_positions_of_a_window(model: HookedUpstream) -> None:
    with pytest.raises(NotApplicable, match="of a window, not of the image"):
        knock_out(model, queries=[0], keys=[1])
    with pytest.raises(InputError, match="no token layout"):
        ablate(model, NAME, pos="patches")
