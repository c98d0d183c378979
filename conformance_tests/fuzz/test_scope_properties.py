"""Hooks as a scope: what they may change, what they must leave, and who sees them."""

from __future__ import annotations

import asyncio
import copy
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prisma_core import UnknownName
from prisma_core.hooks.query import short_name

from .drawing import Drawn, close, models, same

IDENTITIES: dict[str, Callable[[Tensor, Any], Tensor | None]] = {
    "itself": lambda x, at: x,
    "nothing": lambda x, at: None,
    "a copy": lambda x, at: x.clone(),
    "a view": lambda x, at: x.view_as(x),
    "a tensor with other strides": lambda x, at: x.movedim(0, -1).contiguous().movedim(-1, 0),
}
# Points of the stream: reading or replacing one exchanges no kernel.
STREAM = ("embed", "full_embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "logits")
FACTORS = st.sampled_from([-1.0, 0.5, 2.0])


def scaling(names: list[str], factor: float) -> dict[str, Any]:
    return dict.fromkeys(names, lambda x, at: x * factor)


@given(models(), st.sampled_from(sorted(IDENTITIES)), st.booleans())
def test_identity_hooks_leave_the_output(drawn: Drawn, how: str, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        plain = drawn.model(*drawn.inputs)
        hooked = drawn.model.run_with_hooks(*drawn.inputs, hooks=dict.fromkeys(drawn.names, IDENTITIES[how]))
    assert close(hooked, plain)
    if how in ("itself", "nothing", "a copy") and all(short_name(name) in STREAM for name in drawn.names):
        assert same(hooked, plain)


@given(models(), FACTORS, FACTORS)
@torch.no_grad()
def test_an_inner_scope_runs_after_the_outer_one(drawn: Drawn, first: float, second: float) -> None:
    with drawn.model.hooks(scaling(drawn.names, first)), drawn.model.hooks(scaling(drawn.names, second)):
        nested = drawn.model(*drawn.inputs)
    hooks = dict.fromkeys(drawn.names, lambda x, at: x * first * second)
    assert same(nested, drawn.model.run_with_hooks(*drawn.inputs, hooks=hooks))


@given(models(), FACTORS)
@torch.no_grad()
def test_editing_in_place_is_returning_the_edit(drawn: Drawn, factor: float) -> None:
    def silent(x: Tensor, at: Any) -> None:
        x.mul_(factor)

    expected = drawn.model.run_with_hooks(*drawn.inputs, hooks=scaling(drawn.names, factor))
    for hook in (silent, lambda x, at: x.mul_(factor)):
        edited = drawn.model.run_with_hooks(*drawn.inputs, hooks=dict.fromkeys(drawn.names, hook))
        assert same(edited, expected)


@given(models(), st.data())
@torch.no_grad()
def test_nothing_stays_on_after_an_exception(drawn: Drawn, data: st.DataObject) -> None:
    plain = drawn.model(*drawn.inputs)
    names, calls = list(drawn.model.hook_points()), 0
    bad = data.draw(st.sampled_from(drawn.names))

    def count(x: Tensor, at: Any) -> None:
        nonlocal calls
        calls += 1
        if at.name == bad:
            raise ZeroDivisionError

    ways: dict[str, Callable[[], Any]] = {
        "hooks": lambda: drawn.model.run_with_hooks(*drawn.inputs, hooks=dict.fromkeys(drawn.names, count)),
        "cache": lambda: drawn.model.run_with_cache(*drawn.inputs, hooks=dict.fromkeys(drawn.names, count)),
        "loss": lambda: drawn.model.run_with_cache(*drawn.inputs, names=bad, loss=lambda output: 1 / 0),
        "no such name": lambda: drawn.model.run_with_hooks(*drawn.inputs, hooks={bad: count, "no_such_point": count}),
    }
    with pytest.raises((ZeroDivisionError, UnknownName)):
        ways[data.draw(st.sampled_from(sorted(ways)))]()
    calls = 0
    assert same(drawn.model(*drawn.inputs), plain)
    assert calls == 0
    assert list(drawn.model.hook_points()) == names
    _, cache = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names)
    assert set(cache) == set(drawn.names)


@given(models(["vision", "text"]), st.lists(FACTORS, min_size=2, max_size=3))
@torch.no_grad()
def test_threads_see_their_own_hooks(drawn: Drawn, factors: list[float]) -> None:
    alone = [drawn.model.run_with_hooks(*drawn.inputs, hooks=scaling(drawn.names, each)) for each in factors]
    barrier = threading.Barrier(len(factors), timeout=60)

    def run(factor: float) -> Tensor:
        with torch.no_grad(), drawn.model.hooks(scaling(drawn.names, factor)):
            barrier.wait()
            output = drawn.model(*drawn.inputs)
            barrier.wait()
            return output

    with ThreadPoolExecutor(len(factors)) as pool:
        together = list(pool.map(run, factors))
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))


@given(models(["vision", "text"]), st.lists(FACTORS, min_size=2, max_size=3))
@torch.no_grad()
def test_tasks_see_their_own_hooks(drawn: Drawn, factors: list[float]) -> None:
    plain = drawn.model(*drawn.inputs)
    alone = [drawn.model.run_with_hooks(*drawn.inputs, hooks=scaling(drawn.names, each)) for each in factors]

    async def run(factor: float) -> Tensor:
        with drawn.model.hooks(scaling(drawn.names, factor)):
            await asyncio.sleep(0)
            output = drawn.model(*drawn.inputs)
            await asyncio.sleep(0)
        return output

    async def everybody() -> list[Tensor]:
        return list(await asyncio.gather(*(run(each) for each in factors)))

    together = asyncio.run(everybody())
    assert all(same(a, b) for a, b in zip(together, alone, strict=True))
    assert same(drawn.model(*drawn.inputs), plain)


@given(models(), FACTORS, st.booleans())
@torch.no_grad()
def test_a_copy_has_none_of_the_hooks_that_are_on(drawn: Drawn, factor: float, pickled: bool) -> None:
    plain = drawn.model(*drawn.inputs)
    with drawn.model.hooks(scaling(drawn.names, factor)):
        if pickled:
            file = io.BytesIO()
            torch.save(drawn.model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        else:
            other = copy.deepcopy(drawn.model)
        assert same(other(*drawn.inputs), plain)
        drawn.model(*drawn.inputs)
    assert list(other.hook_points()) == list(drawn.model.hook_points())
    hooks = scaling(drawn.names, factor)
    ours, theirs = (model.run_with_hooks(*drawn.inputs, hooks=hooks) for model in (drawn.model, other))
    assert same(ours, theirs)


@given(models(), FACTORS)
@torch.no_grad()
def test_every_hook_runs_once_a_pass_and_at_its_own_place(drawn: Drawn, factor: float) -> None:
    visits: list[str] = []
    with drawn.model.hooks(dict.fromkeys(drawn.names, lambda x, at: visits.append(at.name))):
        drawn.model(*drawn.inputs)
        assert sorted(visits) == sorted(drawn.names)
        drawn.model(*drawn.inputs)
    assert sorted(visits) == sorted(drawn.names * 2)
    order = [name for name in drawn.model.hook_points() if name in drawn.names]
    assert len(order) == len(drawn.names)
