"""Specs do not change; assigning says how to make another."""

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
        with pytest.raises(InputError, match=rf"does not change.*dict\(it\), '{name}': \.\.\."):
            setattr(facts, name, 3)


def test_pydantics_own_ways_raise_pydantics_error() -> None:
    """docs/references.md says so."""
    with pytest.raises(ValidationError):
        TokenLayout.model_validate({"rows": 0})
    layout = TokenLayout(rows=2, columns=3)
    with pytest.raises(SpecError, match=r"rows: .* not -4"):
        layout.model_copy(update={"rows": -4})
    with pytest.raises(SpecError, match="row: Extra"):
        layout.model_copy(update={"row": 4})
    with pytest.raises(SpecError):
        TokenLayout(**{**dict(layout), "rows": -4})
    assert layout.model_copy(update={"rows": 4}) == TokenLayout(rows=4, columns=3)
    assert layout.model_copy() == layout
