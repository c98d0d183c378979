"""Every plain image encoder of transformers comes through its adapter with the same numbers; the others are refused."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
from torch import nn

from prisma_core import UnsupportedArchitecture, adapt
from prisma_core.adapter import qualified_name
from prisma_core.conformance.pytest import suite
from prisma_core.plugins import host

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")

from prisma_hf.refused import REFUSED  # noqa: E402

# One row a class: whether it must come through, or which feature must be named.
TABLE = list(csv.DictReader((Path(__file__).parent / "hf_plain.csv").open(encoding="utf-8")))
PLAIN = {row["class"] for row in TABLE if row["expected"] == "ok"}
FEATURES = {row["class"]: row["feature"] for row in TABLE if row["expected"] == "unsupported"}

# What each architecture computes is compared for all; how hooks behave depends on its facts alone.
ONCE = ["hooks.live", "parity.gradients", "threads"]

test_conformance = suite("hf", once=ONCE)


def test_every_plain_class_has_a_case() -> None:
    found = {case.name.partition(".")[0] for case, plugin in host().cases() if plugin == "hf"}
    assert found == PLAIN


def test_every_other_class_is_accounted_for() -> None:
    own = {"Phi4MultimodalVisionModel"}  # found out by its facts
    assert {path.rpartition(".")[2] for path in REFUSED} | own == set(FEATURES)


@pytest.mark.parametrize("path", REFUSED)
def test_what_cannot_be_represented_is_refused_by_feature(path: str) -> None:
    module, _, name = path.rpartition(".")
    found = importlib.util.find_spec(module)  # to import them all would take longer than all other tests
    assert found is not None
    assert found.origin is not None
    assert f"class {name}(" in Path(found.origin).read_text(encoding="utf-8")
    upstream = type(name, (nn.Module,), {"__module__": module})()
    assert qualified_name(upstream) == path
    with pytest.raises(UnsupportedArchitecture) as refusal:
        adapt(upstream)
    assert FEATURES[name] in str(refusal.value)
