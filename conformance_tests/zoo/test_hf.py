"""Every plain image encoder of transformers comes through its adapter with the same numbers; the others are refused."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
from prisma_conformance.pytest import suite
from prisma_hf.refused import refusals
from torch import nn

from prisma_core import UnsupportedArchitecture, adapt
from prisma_core.host import installed

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")

# One row a class among transformers' plain towers: whether it must come through, or what stands in the way.
TABLE = list(csv.DictReader((Path(__file__).parent / "hf_plain.csv").open(encoding="utf-8")))
PLAIN = {row["class"] for row in TABLE if row["expected"] == "ok"}
FOREIGN = [row["class"] for row in TABLE if row["expected"] == "no adapter"]
TIMM_HAS = {
    "swin.modeling_swin.SwinModel": "swin",
    "hiera.modeling_hiera.HieraModel": "hiera",
    "sam.modeling_sam.SamModel": "samvit",
}

# What each architecture computes is compared for all; how hooks behave depends on its facts alone.
ONCE = ["hooks.live", "parity.gradients", "threads"]

test_conformance = suite("hf", once=ONCE)


def test_every_plain_class_has_a_case() -> None:
    found = {case.name.partition(".")[0] for case, plugin in installed().cases() if plugin == "hf"}
    assert found == PLAIN


@pytest.mark.parametrize("path", FOREIGN)
def test_classes_with_another_form_inside_are_taken_by_no_adapter(path: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"no installed plugin adapts|timm's model of this"):
        adapt(named(path))


@pytest.mark.parametrize("path", TIMM_HAS)
def test_families_that_timm_has_as_hooked_upstreams_are_refused_with_a_reference(path: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"prisma\.load\('timm:{TIMM_HAS[path]}"):
        adapt(named(f"transformers.models.{path}"))


def test_every_class_that_is_refused_exists() -> None:
    for part in refusals():
        for path in part.types:
            named(path)


def named(path: str) -> nn.Module:
    """A module of a class of transformers' by name: to import them all would take longer than all other tests."""
    module, _, name = path.rpartition(".")
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    assert f"class {name}(" in Path(found.origin).read_text(encoding="utf-8")
    return type(name, (nn.Module,), {"__module__": module})()
