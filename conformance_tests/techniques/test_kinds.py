"""The table of techniques and kinds of model: it can say no, and leaves no technique out."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import prisma_lens
import prisma_patch
import pytest
import torch

from prisma_core import NotApplicable, Result

DOCS = Path(__file__).parents[2] / "docs"
# Left out: parts of others, metrics, types, and what needs tensors, a harvest or numbers rather than a model.
BESIDE = {"patch_heads", "Switch", "find_circuit", "Circuit", "circuit_faithfulness", "edge_effects", "change_points"}
BESIDE |= {"together", "logit", "logit_difference", "as_metric", "Metric", "sweep", "Variant", "prisma_commands"}
BESIDE |= {"token_logits", "Lens", "LENS_NAMES", "readout", "Readout", "TunedLens", "unembed_hash", "names_for"}
BESIDE |= {"textspan", "second_order_names", "probe_harvest"}


@pytest.fixture(scope="module")
def techniques() -> ModuleType:
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("technique_kinds")
    finally:
        sys.path.remove(str(DOCS))


def test_every_technique_is_in_the_table(techniques: ModuleType) -> None:
    named = " ".join(name for rows in techniques.techniques().values() for name in rows)
    every = [*prisma_lens.__all__, *prisma_patch.__all__]
    assert [name for name in every if f"`{name}`" not in named and name not in BESIDE] == []
    assert [name for name in BESIDE if name not in every] == []


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
