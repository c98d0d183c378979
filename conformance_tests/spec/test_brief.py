"""Reprs: short, in code where it can be, tables of names, and never the numbers of tensors."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import models
import pytest
import torch
from kinds import KINDS

import prisma_core as prisma
from prisma_core import TokenLayout
from prisma_core.inputs import Preprocess
from prisma_core.spec import (
    AttentionSpec,
    BlockSpec,
    DualSpec,
    EmbedSpec,
    Interpolation,
    MlpSpec,
    ModelSpec,
    NormSpec,
    PoolSpec,
    RopeCount,
    RopeGrid,
    RopeSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.spec.brief import BriefModel, BriefRepr, folded

# fmt: off
NAMES = {each.__name__: each for each in (
    AttentionSpec, BlockSpec, DualSpec, EmbedSpec, Interpolation, MlpSpec, ModelSpec, NormSpec, PoolSpec, RopeCount,
    RopeGrid, RopeSpec, TextPoolSpec, TextSpec, TokenLayout, Preprocess,
)}
# fmt: on
PLUGINS = (
    "prisma_toy",
    "prisma_lens",
    "prisma_patch",
    "prisma_harvest",
    "prisma_view",
    "prisma_sae",
    "prisma_registers",
    "prisma_conformance",
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_the_repr_of_a_spec_is_code_that_makes_it(name: str) -> None:
    spec = KINDS[name]
    assert eval(repr(spec), dict(NAMES)) == spec
    assert str(spec) == repr(spec)


def test_defaults_are_left_out_and_equal_blocks_stand_once() -> None:
    spec = ModelSpec.plain(layers=12)
    assert repr(spec).count("BlockSpec") == 1
    assert "12 * (BlockSpec(" in repr(spec)
    assert repr(TokenLayout(cls=1, rows=2, columns=3)) == "TokenLayout(cls=1, rows=2, columns=3)"
    assert repr(Preprocess(size=(8, 12), crop=0.5)) == "Preprocess(size=(8, 12), crop=0.5)"
    one, other = spec.blocks[0], spec.blocks[0].model_copy(update={"attn_scale": True})
    mixed = spec.model_copy(update={"blocks": (one, one, other, one)})
    assert eval(repr(mixed), dict(NAMES)) == mixed
    assert repr(mixed).count("BlockSpec(") == 3


def test_layers_that_are_alike_are_one_row() -> None:
    rows = [(f"blocks.{layer}.hook_z", "a") for layer in (0, 1, 2, 5)] + [("blocks.3.hook_z", "b"), ("head", "a")]
    assert folded(rows) == [("blocks.{0-2,5}.hook_z", "a"), ("blocks.3.hook_z", "b"), ("head", "a")]
    points = models.build().hook_points()
    text = repr(points)
    assert text.startswith(f"{len(points)} hook points\n")
    assert "blocks.{0-1}.attn.hook_pattern" in text
    assert "batch head query_pos key_pos" in text
    assert points == dict(points)


def test_a_cache_is_short_and_prints_a_table() -> None:
    _, cache = models.build().run_with_cache(torch.zeros(2, 3, 8, 12), names="*resid*")
    assert len(repr(cache).splitlines()) == 1
    lines = str(cache).splitlines()
    assert lines[0] == repr(cache)
    assert "  blocks.{0-1}.hook_resid_pre   batch pos d_model" in lines
    assert "<td>blocks.{0-1}.hook_resid_pre</td>" in cache._repr_html_()


def test_a_table_of_a_cache_makes_no_activation() -> None:
    _, cache = models.build().run_with_cache(torch.zeros(2, 3, 8, 12))
    before = cache.nbytes
    assert len(str(cache).splitlines()) > 10
    assert cache.nbytes == before
    list(cache.values())
    assert cache.nbytes > before


def test_a_model_says_first_what_it_is() -> None:
    model = prisma.load("toy:scenes-3l")
    assert repr(model).splitlines()[1].strip() == "toy:scenes-3l, 443 thousand parameters"
    model.reference = "<b>mine</b>"
    text = model._repr_html_()
    assert "<b>mine" not in text
    assert text.count("<details>") == 2


@dataclasses.dataclass(repr=False)
class Drawn(BriefRepr):
    image: torch.Tensor
    parts: dict[str, torch.Tensor]
    several: tuple[torch.Tensor, ...]
    seed: int


def test_tensors_are_shown_by_shape() -> None:
    drawn = Drawn(torch.rand(2, 3), {"a": torch.zeros(4)}, (torch.ones(1, dtype=torch.int64),), 5)
    assert repr(drawn) == "Drawn(image=float32 [2 3], parts={'a': float32 [4]}, several=[int64 [1]], seed=5)"


@dataclasses.dataclass(repr=False)
class Described(BriefRepr):
    model: Any
    data: Any
    effects: Any


def test_models_long_lists_and_results_are_shown_in_a_line() -> None:
    model = prisma.load("toy:scenes-3l")
    shown = Described(model, list(range(1000)), prisma.Result(torch.zeros(2, 3), ("layer", "head")))
    expected = ("HookedViT(toy:scenes-3l, 443 thousand parameters)", "list of 1000", "Result(layer 2, head 3) ...")
    assert [line.split("=", 1)[1] for line in repr(shown).splitlines()[1:-1]] == [f"{each}," for each in expected]


def holds_tensors(kind: Any) -> bool:
    shown = [str(each.type) for each in dataclasses.fields(kind) if each.repr]
    return any("Tensor" in each and "Callable" not in each for each in shown)


@pytest.mark.parametrize("name", PLUGINS)
def test_no_public_dataclass_prints_tensors(name: str) -> None:
    module = importlib.import_module(name)
    kinds = [getattr(module, each) for each in module.__all__]
    holding = [
        kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind) and holds_tensors(kind)
    ]
    generated = [kind.__name__ for kind in holding if hasattr(kind.__repr__, "__wrapped__")]  # by dataclasses
    assert generated == []


def test_a_dataclass_that_prints_tensors_would_be_found() -> None:
    kind = dataclasses.make_dataclass("Loud", [("x", "Tensor")])
    assert holds_tensors(kind)
    assert hasattr(kind.__repr__, "__wrapped__")


class Marked(BriefModel):
    text: str


def test_a_spec_is_a_table_in_a_notebook_and_its_defaults_are_left_out() -> None:
    html = TokenLayout(rows=2, columns=3, cls=True)._repr_html_()
    assert "<caption>TokenLayout</caption>" in html
    assert "<td>rows</td><td>2</td>" in html
    assert "frames" not in html
    assert "&lt;i&gt;" in Marked(text="<i>")._repr_html_()
