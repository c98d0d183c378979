"""Every plain image encoder of transformers comes through its adapter with the same numbers; the others are refused."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
from prisma_conformance.pytest import suite
from torch import nn

from prisma_core import UnsupportedArchitecture, adapt
from prisma_core.host import installed

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")

# One row a class among transformers' plain towers: whether it must come through, or what stands in the way.
TABLE = list(csv.DictReader((Path(__file__).parent / "hf_plain.csv").open(encoding="utf-8")))
PLAIN = {row["class"] for row in TABLE if row["expected"] == "ok"}
FOREIGN = [row["class"] for row in TABLE if row["expected"] == "no adapter"]

# What each architecture computes is compared for all; how hooks behave depends on its facts alone.
ONCE = ["hooks.live", "parity.gradients", "threads"]

test_conformance = suite("hf", once=ONCE)


def test_every_plain_class_has_a_case() -> None:
    found = {case.name.partition(".")[0] for case, plugin in installed().cases() if plugin == "hf"}
    assert found == PLAIN


@pytest.mark.parametrize("path", FOREIGN)
def test_classes_with_another_form_inside_are_taken_by_no_adapter(path: str) -> None:
    module, _, name = path.rpartition(".")
    found = importlib.util.find_spec(module)  # to import them all would take longer than all other tests
    assert found is not None
    assert found.origin is not None
    assert f"class {name}(" in Path(found.origin).read_text(encoding="utf-8")
    with pytest.raises(UnsupportedArchitecture, match="no installed plugin adapts this type"):
        adapt(type(name, (nn.Module,), {"__module__": module})())
