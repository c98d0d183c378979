"""Specs do not change, and copies with other facts are checked like new ones."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from prisma_core import InputError, ModelSpec, TokenLayout
from prisma_core.errors import SpecError
from prisma_core.inputs import Preprocess

SPEC = ModelSpec.plain(layers=1)
FACTS = [SPEC, SPEC.layout, SPEC.blocks[0].attn, Preprocess(size=(8, 8))]


@pytest.mark.parametrize("facts", FACTS, ids=lambda facts: type(facts).__name__)
def test_assignment_says_how_to_make_another(facts: Any) -> None:
    for name in (next(iter(type(facts).model_fields)), "unheard_of"):
        with pytest.raises(InputError, match=rf"does not change.*model_copy\(update=\{{'{name}': \.\.\.\}}\)"):
            setattr(facts, name, 3)


@pytest.mark.parametrize(
    ("facts", "update"),
    [
        (SPEC, {"d_model": -3}),
        (SPEC, {"unheard_of": 3}),
        (SPEC, {"layout": None}),
        (SPEC.layout, {"rows": 0}),
        (SPEC.blocks[0].ln1, {"eps": 0}),
        (FACTS[-1], {"size": (0, 0)}),
        (FACTS[-1], {"std": (0.0, 0.0, 0.0)}),
    ],
)
def test_a_copy_with_facts_that_make_none_is_refused(facts: Any, update: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=rf"{type(facts).__name__} cannot be made"):
        facts.model_copy(update=update)


def test_copies() -> None:
    layout = TokenLayout(rows=2, columns=3)
    assert layout.model_copy(update={"rows": 4}) == TokenLayout(rows=4, columns=3)
    assert layout.model_copy() == layout
    assert SPEC.model_copy(deep=True) == SPEC
    assert SPEC.model_copy(update={"blocks": SPEC.blocks}).blocks[0] is SPEC.blocks[0]


def test_pydantics_own_ways_raise_pydantics_error() -> None:
    """docs/references.md says so."""
    with pytest.raises(ValidationError):
        TokenLayout.model_validate({"rows": 0})
