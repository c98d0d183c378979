"""Caches: they hold what the pass went by, cut and cast as asked, and never change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from prisma_conformance.strategies import Index, positions
from torch import Tensor

from prisma_core import HookError, InputError
from prisma_core.hooks.query import layer_of, short_name

from .drawing import ROUNDING, Drawn, close, models, same

DTYPES = st.sampled_from([None, torch.float64, torch.float32, torch.bfloat16])
POSITIONS, HEADS = ("pos", "query_pos"), ("head",)


@given(models(), st.sampled_from([None, 0.5, -1.0]), st.booleans())
@torch.no_grad()
def test_a_cache_holds_what_the_hooks_made(drawn: Drawn, factor: float | None, in_place: bool) -> None:
    seen: dict[str, Tensor] = {}

    def record(x: Tensor, at: Any) -> Tensor | None:
        if factor is not None:
            x = x.mul_(factor) if in_place else x * factor
        seen[at.name] = x.clone()
        return x

    output, cache = drawn.model.run_with_cache(
        *drawn.inputs, names=drawn.names, hooks=dict.fromkeys(drawn.names, record)
    )
    output.fill_(7)
    for x in drawn.inputs:
        x.zero_()
    for parameter in drawn.model.parameters():
        parameter.zero_()
    assert set(cache) == set(seen) == set(drawn.names)
    assert all(same(cache[name], x) for name, x in seen.items())


@given(models(["vision", "text"]), st.data(), DTYPES)
@torch.no_grad()
def test_a_cut_cache_is_the_cut_of_a_whole_one(drawn: Drawn, data: st.DataObject, dtype: torch.dtype | None) -> None:
    _, whole = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names)
    pos, heads = (_choice(data, drawn, whole, axes) for axes in (POSITIONS, HEADS))
    _, cut = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names, pos=pos, heads=heads, dtype=dtype)
    for name in drawn.names:
        expected = whole[name]
        for index, axes in ((pos, POSITIONS), (heads, HEADS)):
            expected = _cut(expected, whole.axes[name].split(), axes, index)
        expected = expected if dtype is None else expected.to(dtype)
        assert close(cut[name], expected, _rounding(drawn, dtype)), name
        assert cut[name].dtype == expected.dtype


def _rounding(drawn: Drawn, dtype: torch.dtype | None = None) -> float:
    """Return how far a cut cache may be off: where it keeps rows of patterns, its pass is the fused one."""
    if not any(short_name(name).endswith(("attn_scores", "pattern")) for name in drawn.names):
        return 0.0
    return max(ROUNDING, 0.0 if dtype is None else 2 * torch.finfo(dtype).eps)  # the passes', and the cast's


def _sizes(drawn: Drawn, cache: Any, axes: tuple[str, ...]) -> list[int]:
    places = [(cache[name], cache.axes[name].split()) for name in drawn.names]
    return [x.shape[named.index(axis)] for x, named in places for axis in axes if axis in named]


def _choice(data: st.DataObject, drawn: Drawn, cache: Any, axes: tuple[str, ...]) -> Index | None:
    sizes = _sizes(drawn, cache, axes)
    return data.draw(st.none() | positions(min(sizes))) if sizes else None


def _cut(x: Tensor, named: list[str], axes: tuple[str, ...], index: Index | None) -> Tensor:
    axis = next((named.index(axis) for axis in axes if axis in named), None)
    if index is None or axis is None:
        return x
    places = range(x.shape[axis])[index] if isinstance(index, slice) else index
    columns = torch.tensor([places] if isinstance(places, int) else list(places), dtype=torch.long)
    return x.index_select(axis, columns % x.shape[axis])


@given(models(["vision"]), st.sampled_from(["cls", "distillation", "registers", "prefix", "patches", "all"]))
@torch.no_grad()
def test_a_subset_of_tokens_is_what_the_layout_says(drawn: Drawn, subset: str) -> None:
    _, whole = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names)
    assume(_sizes(drawn, whole, POSITIONS))
    layout = drawn.model.layout_for(*drawn.inputs)
    if not range(layout.n_tokens)[layout.slice(subset)]:
        with pytest.raises(InputError, match=f"no {subset}"):
            drawn.model.run_with_cache(*drawn.inputs, names=drawn.names, pos=subset)
        return
    _, cut = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names, pos=subset)
    for name in drawn.names:
        assert close(
            cut[name], _cut(whole[name], whole.axes[name].split(), POSITIONS, layout.slice(subset)), _rounding(drawn)
        )


@given(models(["vision", "text"]), st.data())
@torch.no_grad()
def test_a_choice_along_an_axis_that_nothing_has_is_an_error(drawn: Drawn, data: st.DataObject) -> None:
    _, whole = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names)
    axes = data.draw(st.sampled_from([POSITIONS, HEADS]))
    choice = {"pos": 0} if axes == POSITIONS else {"heads": 0}
    if _sizes(drawn, whole, axes):
        with pytest.raises((InputError, HookError), match="999"):
            drawn.model.run_with_cache(*drawn.inputs, names=drawn.names, **dict.fromkeys(choice, 999))
    else:
        with pytest.raises(InputError, match=f"{axes[0]}"):
            drawn.model.run_with_cache(*drawn.inputs, names=drawn.names, **choice)


@given(models(), DTYPES, st.booleans())
@torch.no_grad()
def test_a_scope_that_caches_is_run_with_cache(drawn: Drawn, dtype: torch.dtype | None, output: bool) -> None:
    with drawn.model.caching(drawn.names, dtype=dtype) as scoped:
        drawn.model(*drawn.inputs)
    _, run = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names, dtype=dtype, output=output)
    assert set(scoped) == set(run) == set(drawn.names)
    assert all(same(scoped[name], run[name]) for name in drawn.names)


@given(models())
def test_gradients_are_what_backward_hooks_see(drawn: Drawn) -> None:
    seen: dict[str, Tensor] = {}

    def record(gradient: Tensor, at: Any) -> None:
        seen[at.name] = gradient.clone()

    _, cache = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names, loss=lambda y: y.square().sum())
    output = drawn.model.run_with_hooks(*drawn.inputs, backward=dict.fromkeys(drawn.names, record))
    output.square().sum().backward()
    drawn.model.zero_grad()
    for name in drawn.names:
        assert close(cache.grad[name], seen.get(name, torch.zeros_like(cache[name])), 1e-7), name


@given(models(["vision", "text"], derived=False))
@torch.no_grad()
def test_each_of_a_batch_is_as_it_is_alone(drawn: Drawn) -> None:
    (batch,) = drawn.inputs
    _, together = drawn.model.run_with_cache(batch, names=drawn.names)
    for index in range(len(batch)):
        _, alone = drawn.model.run_with_cache(batch[index : index + 1], names=drawn.names, remove_batch_dim=True)
        for name in drawn.names:
            assert close(alone[name], together[name][index]), name


@given(models(["vision"]), st.data())
@torch.no_grad()
def test_a_pass_in_two_parts_is_the_pass(drawn: Drawn, data: st.DataObject) -> None:
    depth = drawn.spec.n_layers
    layer = data.draw(st.integers(-depth, depth))
    stream = drawn.model(*drawn.inputs, stop_at_layer=layer)
    whole, cache = drawn.model.run_with_cache(*drawn.inputs, names="resid_pre")
    if layer % depth == layer or layer < 0:
        assert same(stream, cache["resid_pre", layer])
    assume(drawn.inputs[0].shape[-2:] == drawn.spec.image_size)
    assert close(drawn.model(stream, start_at_layer=layer), whole)


@given(models(["vision"]))
@torch.no_grad()
def test_views_have_each_token_where_its_name_says(drawn: Drawn) -> None:
    _, cache = drawn.model.run_with_cache(*drawn.inputs, names="resid_post")
    layout = drawn.model.layout_for(*drawn.inputs)
    x, names = cache["resid_post", 0], layout.token_names()
    grid = cache.patches("resid_post", 0)
    for index, name in enumerate(names):
        if name == "cls":
            assert same(cache.cls("resid_post", 0), x[:, index])
        elif name.startswith("reg"):
            assert same(cache.registers("resid_post", 0)[:, int(name[3:])], x[:, index])
        elif name != "dist":
            frame, _, place = name.rpartition("r")
            row, column = map(int, place.split("c"))
            at = grid[:, int(frame[1:])] if layout.frames > 1 else grid
            assert same(at[:, row, column], x[:, index]), name


@given(models(), DTYPES)
@torch.no_grad()
def test_a_cache_is_a_mapping(drawn: Drawn, dtype: torch.dtype | None) -> None:
    _, cache = drawn.model.run_with_cache(*drawn.inputs, names=drawn.names)
    assert dict(cache) == cache.store
    assert len(cache) == len(drawn.names)
    cast = cache.to(dtype=dtype)
    for name, x in cache.items():
        assert name in cache
        assert same(cast[name], x if dtype is None else x.to(dtype))
        alike = [other for other in drawn.model.hook_points() if short_name(other) == short_name(name)]
        layer = layer_of(name)
        if layer is not None and [other for other in alike if layer_of(other) == layer] == [name]:
            assert cache[short_name(name), layer] is x
    absent = [name for name in drawn.model.hook_points() if name not in drawn.names]
    assert not any(name in cache for name in absent)
