"""Hook names: what a query selects, by properties of the grammar."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from prisma_conformance.strategies import queries

from prisma_core import ModelSpec, UnknownName
from prisma_core.hooks.query import layer_of, resolve, resolve_one, short_name
from prisma_core.spec import DualSpec, TextSpec
from prisma_core.transformer import build


@cache
def points(kind: str) -> tuple[list[str], frozenset[str]]:
    """Return all names of a model of eleven layers, and those of derived points."""
    vision, text = ModelSpec.plain(layers=11, registers=1), TextSpec.plain(layers=3)
    model = build({"vision": vision, "text": text, "dual": DualSpec(vision=vision, text=text)}[kind])
    found = model.hook_points()
    return list(found), frozenset(name for name, point in found.items() if point.derived)


KINDS = st.sampled_from(["vision", "text", "dual"])


@given(st.data(), KINDS)
def test_a_query_selects_names_of_the_model_in_firing_order(data: st.DataObject, kind: str) -> None:
    names, derived = points(kind)
    query = data.draw(queries(names))
    try:
        selected = resolve(query, names, derived)
    except UnknownName:  # a predicate or a glob that derived points alone fit
        assume(False)
    assert selected
    assert selected == [name for name in names if name in set(selected)]
    assert resolve(selected, names, derived) == selected
    assert resolve(list(reversed(selected)), names, derived) == selected
    assert resolve(lambda name: name in selected, names) == selected


@given(st.data(), KINDS)
def test_a_collection_selects_what_its_parts_select(data: st.DataObject, kind: str) -> None:
    names, derived = points(kind)
    every = [name for name in names if name not in derived]
    parts = data.draw(st.lists(queries(every), min_size=1, max_size=4))
    union = {name for part in parts for name in resolve(part, names, derived)}
    assert set(resolve(list(parts), names, derived)) == union


@given(st.data(), KINDS)
def test_every_shorthand_of_a_name_selects_it(data: st.DataObject, kind: str) -> None:
    names, derived = points(kind)
    name = data.draw(st.sampled_from(names))
    parts = name.split(".")
    shorthand = ".".join(parts[data.draw(st.integers(0, len(parts) - 1)) :])
    shorthand = data.draw(st.sampled_from([shorthand, shorthand.replace("hook_", "")]))
    selected = resolve(shorthand, names, derived)
    assert name in selected or selected == [shorthand]  # a pair's own logits, and those of a tower: the full name wins
    assert all(short_name(each) == short_name(name) for each in selected)
    layer = layer_of(name)
    if layer is not None:
        at_layer = resolve((shorthand, layer), names, derived)
        assert name in at_layer
        assert all(layer_of(each) == layer for each in at_layer)
        assert set(at_layer) == {each for each in selected if layer_of(each) == layer}


@given(st.data(), st.sampled_from(["vision", "text"]))
def test_a_negative_layer_counts_from_the_end(data: st.DataObject, kind: str) -> None:
    names, _ = points(kind)
    depth = 1 + max(layer_of(name) or 0 for name in names)
    name = data.draw(st.sampled_from([name for name in names if layer_of(name) is not None]))
    layer = data.draw(st.integers(-depth, depth - 1))
    assert resolve((short_name(name), layer), names) == resolve((short_name(name), layer % depth), names)
    with pytest.raises(UnknownName, match=f"0 to {depth - 1}"):
        resolve((short_name(name), data.draw(st.sampled_from([depth, -depth - 1]))), names)


@given(st.data(), KINDS)
def test_one_name_or_an_error_that_names_two(data: st.DataObject, kind: str) -> None:
    names, _ = points(kind)
    query = data.draw(queries(names).filter(lambda query: isinstance(query, str | tuple)))
    selected = resolve([query], names)
    if len(selected) == 1:
        assert resolve_one(query, names) == selected[0]
    else:
        with pytest.raises(UnknownName) as caught:
            resolve_one(query, names)
        assert all(name in str(caught.value) for name in selected[:2])


@given(st.data(), KINDS)
def test_a_misspelt_name_is_an_error_that_suggests_one(data: st.DataObject, kind: str) -> None:
    names, derived = points(kind)
    name = data.draw(st.sampled_from(names))
    at = data.draw(st.integers(len(name) - len(short_name(name)), len(name) - 1))
    wrong = name[:at] + data.draw(st.sampled_from(["", "x", name[at] * 2])) + name[at + 1 :]
    assume(not any(short_name(each) == short_name(wrong) for each in names))
    with pytest.raises(UnknownName, match="Did you mean"):
        resolve(wrong, names, derived)


@given(st.text(max_size=12), KINDS)
def test_any_text_selects_names_or_is_an_error(text: str, kind: str) -> None:
    names, derived = points(kind)
    if text in ("", "hook_") or any(text in name for name in names) or set("*?[") & set(text):
        with suppress(UnknownName):
            assert set(resolve(text, names, derived)) <= set(names)
    else:
        with pytest.raises(UnknownName) as caught:
            resolve(text, names, derived)
        assert repr(text) in str(caught.value)
