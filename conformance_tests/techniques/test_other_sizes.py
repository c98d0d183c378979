"""Interventions on images of another size than the model's own, and on streams with rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from models import build
from prisma_patch import ablate, causal, interventions, knock_out, local, masks
from torch import Tensor, nn
from twins import twin

from prisma_core import HookedViT, InputError
from prisma_core.maps.places import HookMap
from prisma_core.spec import MapSpec
from prisma_core.upstream.model import HookedUpstream

PREFIX, NATIVE, LARGE = 2, 8, 14
Scopes = Callable[[HookedViT], AbstractContextManager[Any]]


@pytest.fixture
def model(in_float64: None) -> HookedViT:
    return build(registers=1, interpolation=True)


@pytest.fixture
def large() -> Tensor:
    return torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def moved(scope: AbstractContextManager[Any], model: HookedViT, x: Tensor) -> list[int]:
    """Return the tokens whose stream before the second block a scope changes."""
    _, before = model.run_with_cache(x, names=("resid_pre", 1))
    with scope:
        _, after = model.run_with_cache(x, names=("resid_pre", 1))
    gap = (after["resid_pre", 1] - before["resid_pre", 1]).abs().amax((0, 2))
    return gap.gt(0).nonzero().flatten().tolist()


SCOPES: dict[str, tuple[Any, Scopes]] = {
    "ablate": (interventions, lambda model: interventions.ablate(model, ("resid_pre", 1), pos="patches")),
    "steer": (interventions, lambda model: interventions.steer(model, ("resid_pre", 1), torch.ones(18), pos="patches")),
}


@pytest.mark.parametrize("name", SCOPES)
def test_patches_are_all_patches_of_the_image_that_comes(
    model: HookedViT, large: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, scope = SCOPES[name]
    assert moved(scope(model), model, large) == list(range(PREFIX, LARGE))
    assert moved(scope(model), model, large[:, :, :8]) == list(range(PREFIX, NATIVE))
    native = twin(module, "partial(tokens_among, layout, pos)", "lambda n: token_positions(layout, pos)")
    monkeypatch.setattr(module, name, getattr(native, name))
    assert moved(scope(model), model, large) != list(range(PREFIX, LARGE))


def hidden(scope: AbstractContextManager[Any], model: HookedViT, x: Tensor) -> Tensor:
    with scope:
        _, cache = model.run_with_cache(x, names="pattern")
    return cache["pattern", 0][0, 0] == 0


def test_knocked_out_patches_are_those_of_the_image_that_comes(model: HookedViT, large: Tensor) -> None:
    want = torch.zeros(LARGE, LARGE, dtype=torch.bool)
    want[PREFIX:, 0] = True
    assert torch.equal(hidden(masks.knock_out(model, "patches", "cls"), model, large), want)
    native = twin(masks.knock_out, "tokens_among(layout, queries, n_queries)", "token_positions(layout, queries)")
    assert not torch.equal(hidden(native(model, "patches", "cls"), model, large), want)
    order = torch.ones(LARGE, LARGE, dtype=torch.bool).triu(1)
    order[:PREFIX] = False
    assert torch.equal(hidden(causal(model), model, large), order)


def test_slices_count_the_tokens_of_the_pass(model: HookedViT, large: Tensor) -> None:
    assert moved(ablate(model, ("resid_pre", 1), pos=slice(-3, None)), model, large) == [11, 12, 13]
    assert moved(ablate(model, ("resid_pre", 1), pos=slice(-3, None)), model, large[:, :, :8]) == [5, 6, 7]


def test_what_another_size_does_not_tell_is_said(model: HookedViT, large: Tensor) -> None:
    with pytest.raises(InputError, match="14 tokens"), local(model, 1):
        model(large)
    with pytest.raises(InputError, match="14 tokens"), knock_out(model, keys="frame 0"):
        model(large)
    with knock_out(model, keys="frame 0"):
        assert model(large[:, :, :8]).isfinite().all()
    other = ablate(model, ("resid_pre", 1), method="resample", reference=large[:, :, :8])
    with pytest.raises(InputError, match=r"\[2, 14, 18\]"), other:
        model(large)
    with ablate(model, ("resid_pre", 1), method="mean", reference=large[:, :, :8]):
        assert model(large).isfinite().all()


class _Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).mean((1, 2)))


def test_the_mean_of_a_grid_is_over_all_its_places() -> None:
    rows = "embed -> blocks.0.hook_resid_pre : batch row column d_model\nhead -> hook_logits : batch class"
    model = HookedUpstream(_Grid().eval(), HookMap.parse(rows), MapSpec(shape=(4, 6, 3)), lambda result: result)
    x = torch.randn(2, 4, 6, 3, generator=torch.Generator().manual_seed(0))
    _, clean = model.run_with_cache(x)
    with ablate(model, "hook_resid_pre", method="mean", reference=x):
        _, cache = model.run_with_cache(x)
    mean = clean["resid_pre", 0].mean((0, 1, 2))
    torch.testing.assert_close(cache["resid_pre", 0], mean.expand(2, 4, 6, 5))
