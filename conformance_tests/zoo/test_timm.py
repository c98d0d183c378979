"""Every plain vision transformer of timm comes through its adapter with the same numbers; the others are refused.

What is hooked where it stands (``mapped`` in the table) is tested in ``test_mapped.py``.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from prisma_conformance.pytest import suite

from prisma_core import UnsupportedArchitecture, adapt
from prisma_core.host import installed

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

# One row an architecture of timm's transformers: whether it must come through, or which feature must be named.
TABLE = list(csv.DictReader((Path(__file__).parent / "timm_plain.csv").open(encoding="utf-8")))
PLAIN = sorted(row["name"] for row in TABLE if row["expected"] == "ok")
REFUSED = [(row["name"], row["feature"]) for row in TABLE if row["expected"] == "unsupported"]

MAPPED = {row["name"] for row in csv.DictReader((Path(__file__).parent / "timm_mapped.csv").open(encoding="utf-8"))}
CASES = [case for case, _ in installed().cases({"timm"}) if case.name not in MAPPED]

# What each architecture computes is compared for all; how hooks behave depends on its facts alone.
ONCE = ["hooks.live", "parity.gradients", "threads"]

test_conformance = suite("timm", cases=CASES, once=ONCE)


def test_every_plain_architecture_has_a_case() -> None:
    assert sorted(case.name for case in CASES) == PLAIN
    assert {row["name"] for row in TABLE if row["expected"] == "mapped"} <= MAPPED


@pytest.mark.parametrize(("name", "feature"), REFUSED)
def test_what_cannot_be_represented_is_refused_by_feature(name: str, feature: str) -> None:
    with torch.device("meta"):
        upstream = timm.create_model(name)
    with pytest.raises(UnsupportedArchitecture) as refusal:
        adapt(upstream)
    assert feature.lower() in str(refusal.value).lower()
