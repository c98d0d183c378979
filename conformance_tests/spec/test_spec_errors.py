"""Facts that make no spec are an error of Prisma's, whichever fact of whichever class, and a ValueError still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from arguments import NONSENSE
from prisma_sae import CoderFacts, TrainConfig
from pydantic import BaseModel

from prisma_core import ModelSpec, PrismaError, SpecError, TokenLayout
from prisma_core.plugin import (
    DualSpec,
    Interpolation,
    MapSpec,
    NormSpec,
    Preprocess,
    RopeCount,
    RopeGrid,
    RopeSpec,
    TextSpec,
    VideoPreprocess,
)

PREPROCESS = Preprocess(size=(8, 12))
ROPE = RopeSpec(layout="half", grid=RopeGrid(coordinates="index", waves=(1.0, 0.5)))
WHOLE = (
    ModelSpec.plain(registers=2, gated=True, n_classes=7),
    ModelSpec.plain(rope=ROPE, pos=False),
    TextSpec.plain(n_classes=7),
    DualSpec(vision=ModelSpec.plain(d_model=12), text=TextSpec.plain(d_model=12)),
    Interpolation(),
    RopeCount(pairs=1, theta=2, rows=2, columns=3),
    PREPROCESS,
    VideoPreprocess(frames=2, each=PREPROCESS),
    CoderFacts(kind="standard", d_in=3, d_sae=7, d_out=3),
    TrainConfig(d_sae=7, k=2),
)


def parts(whole: Any) -> Iterator[BaseModel]:
    """Yield a spec and the specs within it."""
    if isinstance(whole, BaseModel):
        yield whole
        for value in dict(whole).values():
            yield from parts(value)
    elif isinstance(whole, tuple):
        for value in whole[:1]:
            yield from parts(value)


SPECS = {type(part).__name__: part for whole in WHOLE for part in parts(whole)}


@pytest.mark.parametrize("name", SPECS)
def test_nonsense_in_a_spec_is_prismas_error(name: str) -> None:
    spec = SPECS[name]
    kind, facts = type(spec), dict(spec)
    assert kind(**facts) == spec
    with pytest.raises(SpecError, match="nonsense"):
        kind(**facts, nonsense=3)
    refused: list[str] = []
    for field in facts:
        for make in NONSENSE.values():
            try:
                kind(**{**facts, field: make()})
            except SpecError as error:
                refused.append(str(error))
    assert len(refused) > len(facts)
    assert all(text.startswith(f"{name} cannot be made: ") and "http" not in text for text in refused)


def test_the_error_is_of_both_families_and_says_where() -> None:
    for family in (PrismaError, ValueError):
        with pytest.raises(family, match=r"NormSpec cannot be made: eps: .* greater than 0, not -1"):
            NormSpec(eps=-1)
    facts = ModelSpec.plain().model_dump()
    facts["blocks"][1]["ln1"]["eps"] = -1
    with pytest.raises(SpecError, match=r"blocks\.1\.ln1\.eps: .* not -1"):
        ModelSpec(**facts)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"columns": -3}, {"frames": 0}, {"cls": -1}])
def test_a_layout_has_patches(wrong: dict[str, int]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        TokenLayout(**{"rows": 2, "columns": 3, **wrong})


def test_a_map_needs_no_facts_of_a_stream() -> None:
    with pytest.raises(SpecError, match="image_size"):
        MapSpec(image_size="x")  # type: ignore[arg-type]
