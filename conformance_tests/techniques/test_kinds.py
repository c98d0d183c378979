"""The table of techniques and kinds of model: it can say no, and leaves no technique out."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import prisma_patch
import pytest
import torch

from prisma_core import NotApplicable, Result

DOCS = Path(__file__).parents[2] / "docs"
# Left out: parts of others, metrics, types, and what needs a series of numbers or a data set rather than two inputs.
BESIDE = {"patch_heads", "Switch", "find_circuit", "Circuit", "circuit_faithfulness", "edge_effects", "change_points"}
BESIDE |= {"factors_by_place"}
BESIDE |= {"together", "logit", "logit_difference", "as_metric", "Metric", "sweep", "Variant", "prisma_commands"}


@pytest.fixture(scope="module")
def techniques() -> ModuleType:
    spec = importlib.util.spec_from_file_location("technique_kinds", DOCS / "technique_kinds.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["technique_kinds"] = module
    spec.loader.exec_module(module)
    return module


def test_every_technique_is_in_the_table(techniques: ModuleType) -> None:
    named = " ".join(techniques.techniques())
    assert [name for name in prisma_patch.__all__ if f"`{name}`" not in named and name not in BESIDE] == []


def test_a_technique_that_does_nothing_or_cannot_run_gets_no_yes(techniques: ModuleType) -> None:
    kind = techniques.kinds()["classifier"]

    def refused(kind: object) -> None:
        raise NotApplicable("This model has no grid.")

    assert techniques.verdict(lambda kind: nullcontext(), kind) == "it ran, and changed nothing"
    assert techniques.verdict(lambda kind: Result(torch.tensor([torch.nan]), ("batch",)), kind) != "yes"
    assert techniques.verdict(refused, kind) == "This model has no grid."
    assert techniques.verdict(lambda kind: Result(torch.tensor([0.5]), ("batch",)), kind) == "yes"


def test_a_mistake_is_no_reason(techniques: ModuleType) -> None:
    with pytest.raises(ZeroDivisionError):
        techniques.verdict(lambda kind: 1 / 0, techniques.kinds()["video"])
