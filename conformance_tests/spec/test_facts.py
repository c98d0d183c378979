"""Layouts and specs: frozen facts, and the same after a trip through JSON."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from prisma_core import InputError, ModelSpec, SpecError, TokenLayout, UnknownName

LAYOUT = TokenLayout(cls=1, distillation=1, registers=2, rows=2, columns=3)
VIDEO = TokenLayout(cls=1, frames=2, rows=2, columns=3)


def test_counts_and_names():
    assert (LAYOUT.n_prefix, LAYOUT.n_patches, LAYOUT.n_tokens) == (4, 6, 10)
    assert LAYOUT.token_names() == ["cls", "dist", "reg0", "reg1", "r0c0", "r0c1", "r0c2", "r1c0", "r1c1", "r1c2"]
    assert (VIDEO.n_prefix, VIDEO.n_patches, VIDEO.n_tokens) == (1, 12, 13)
    assert VIDEO.token_names()[:2] == ["cls", "f0r0c0"]
    assert VIDEO.token_names()[-1] == "f1r1c2"
    assert len(VIDEO.token_names()) == VIDEO.n_tokens


@pytest.mark.parametrize(
    ("subset", "tokens"),
    [
        ("cls", [0]),
        ("distillation", [1]),
        ("registers", [2, 3]),
        ("prefix", [0, 1, 2, 3]),
        ("patches", [4, 5, 6, 7, 8, 9]),
        ("all", list(range(10))),
    ],
)
def test_subsets(subset, tokens):
    assert list(range(10))[LAYOUT.slice(subset)] == tokens


def test_an_unknown_subset_suggests_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean patches"):
        LAYOUT.slice("patch")


@pytest.mark.parametrize(("shape", "axis"), [((5, 10, 7), 1), ((10, 7), 0), ((5, 4, 10), -1), ((5, 4, 10, 10), 2)])
@pytest.mark.parametrize("patches_alone", [False, True])
def test_a_grid_has_each_patch_where_its_name_says(shape, axis, patches_alone):
    x = torch.randn(shape)
    given = x.narrow(axis, 4, 6) if patches_alone else x
    grid = LAYOUT.grid(given, axis)
    at = axis % x.ndim
    assert grid.shape == (*shape[:at], 2, 3, *shape[at + 1 :])
    for position, name in enumerate(LAYOUT.token_names()):
        if name.startswith("r") and "c" in name and not name.startswith("reg"):
            row, column = map(int, name[1:].split("c"))
            assert torch.equal(grid.select(at, row).select(at, column), x.select(axis, position)), name


@pytest.mark.parametrize("layout", [LAYOUT, VIDEO])
def test_a_token_is_found_by_its_own_name(layout):
    for position, name in enumerate(layout.token_names()):
        assert layout.positions(name) == [position]
    with pytest.raises(UnknownName, match=r"and the tokens cls to (f1)?r1c2\."):
        layout.positions("r7c7")


def test_a_grid_of_frames():
    x = torch.randn(2, 13, 5)
    grid = VIDEO.grid(x)
    assert grid.shape == (2, 2, 2, 3, 5)
    assert torch.equal(grid[:, 1, 0, 2], x[:, VIDEO.token_names().index("f1r0c2")])


def test_a_grid_along_another_axis_names_the_one_that_fits():
    layout = TokenLayout(rows=2, columns=3, cls=True)
    pattern = torch.zeros(2, 4, 7)  # [batch head key]
    with pytest.raises(InputError, match="axis=2"):
        layout.grid(pattern)
    assert layout.grid(pattern, axis=2).shape == (2, 4, 2, 3)


def test_a_grid_of_something_else_is_an_error():
    with pytest.raises(InputError, match="Axis 1 holds 7 positions; this layout has 10 tokens, of which 6 are patches"):
        LAYOUT.grid(torch.zeros(2, 7, 3))


@pytest.mark.parametrize("wrong", [{"rows": 0, "columns": 2}, {"rows": 2, "columns": 2, "row": 1}, {"rows": 2}])
def test_a_layout_that_is_none(wrong):
    with pytest.raises(SpecError):
        TokenLayout(**wrong)


def test_specs_survive_json(variant):
    text = variant.spec.model_dump_json()
    again = ModelSpec.model_validate_json(text)
    assert again == variant.spec
    assert hash(again) == hash(variant.spec)
    twin = type(variant)(again)
    assert list(twin.hook_points()) == list(variant.hook_points())
    shapes = {name: tensor.shape for name, tensor in variant.state_dict().items()}
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == shapes


@pytest.mark.parametrize(
    "path", [(), ("embed",), ("layout",), ("pool",), ("ln_final",), ("blocks", 0), ("blocks", 0, "attn")]
)
def test_a_fact_nobody_knows_is_refused(vit, path):
    facts = json.loads(vit.spec.model_dump_json())
    place = facts
    for step in path:
        place = place[step]
    place["use_hooks"] = True
    with pytest.raises(ValidationError, match="use_hooks"):
        ModelSpec.model_validate(facts)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("d_model",), 0),
        (("n_classes",), -1),
        (("blocks", 0, "attn", "n_kv_heads"), 3),
        (("blocks", 0, "mlp", "act"), "swish"),
        (("blocks", 0, "kind"), "post"),
        (("ln_final", "eps"), 0),
        (("pool", "kind"), "max"),
        (("layout", "rows"), "two"),
    ],
)
def test_facts_that_cannot_be_are_refused(vit, path, value):
    facts = json.loads(vit.spec.model_dump_json())
    place = facts
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(ValidationError):
        ModelSpec.model_validate(facts)


def test_no_fact_switches_a_hook_point():
    """Asking for a hook point is what switches it on."""

    def names(schema):
        for key, value in schema.items() if isinstance(schema, dict) else ():
            if key == "properties":
                yield from value
            yield from names(value)

    assert not [name for name in names(ModelSpec.model_json_schema()) if "hook" in name or name.startswith("use_")]
