"""The kit catches what it claims to catch, and passes what is right."""

from __future__ import annotations

import re

import pytest
import torch
from prisma_conformance import CHECKS, diagnose
from prisma_conformance.doctor.diagnosis import examine
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject

from prisma_core import ModelSpec
from prisma_core.maps.places import HookMap
from prisma_core.spec import NormSpec

pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from .maps import MAP_MUTANTS, MapMutant
from .mutants import CASES, Broken, Mutant, built
from .table import MUTANTS

EPS = NormSpec(eps=1e-3)

RAISED = re.compile(r"[A-Z]\w*: ")  # what run_check makes of an exception


@pytest.mark.parametrize("mutant", [*MUTANTS, *MAP_MUTANTS], ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_mutant_is_caught_by_the_check_that_claims_it(mutant: Mutant | MapMutant) -> None:
    result = run_check(CHECKS[mutant.check], mutant.subject())
    assert result.skipped is None
    assert not result.passed, f"{mutant.check} lets through: {mutant.name}"
    assert not RAISED.match(result.detail), f"nothing was compared: {result.detail}"
    assert mutant.says in result.detail


# Compiling takes long, so one model of one block stands for all.
@pytest.mark.parametrize(
    ("case", "check"),
    [(case, check) for case in CASES for check in CHECKS if (check == "compile") == (case == "single")],
)
def test_what_is_right_passes(case: str, check: str) -> None:
    upstream, adapter = built(case)
    result = run_check(CHECKS[check], Subject(CASES[case], adapter, upstream, seed=1))
    if result.skipped:
        pytest.skip(result.skipped)  # the check's own reason
    assert result.passed, str(result)


def test_every_check_has_a_mutant() -> None:
    assert {mutant.check for mutant in (*MUTANTS, *MAP_MUTANTS)} == set(CHECKS)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.remedy], ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_doctor_says_what_would_help(mutant: Mutant) -> None:
    diagnosis = examine(mutant.subject())
    assert not diagnosis.agrees
    assert diagnosis.remedies, str(diagnosis)
    assert mutant.remedy in str(diagnosis), str(diagnosis)


def test_doctor_tries_one_eps_in_all_norms() -> None:
    upstream, adapter = built("plain")
    norms = [part for part in upstream.modules() if isinstance(part, torch.nn.LayerNorm)]

    def wrong(spec: ModelSpec) -> ModelSpec:
        changed = [block.model_copy(update={"ln1": EPS, "ln2": EPS}) for block in spec.blocks]
        return spec.model_copy(update={"blocks": tuple(changed), "ln_final": EPS})

    broken = Mutant("one wrong eps", "parity.logits", "", spec=wrong)
    told = str(examine(Subject(CASES["plain"], Broken(adapter, broken), upstream, draw=False)))
    assert f"and the logits, with: eps={norms[0].eps:g} in all {len(norms)} norms that have 0.001." in told
    assert "stay off" not in told
    # Where each has an eps of its own, the first that is wrong is named as its hook points are.
    assert "blocks.{l}.ln1.eps=that of each layer (it is 0.001)" in str(
        examine(Subject(CASES["plain"], Broken(adapter, broken), upstream))
    )


@pytest.mark.parametrize(
    ("row", "says", "place"),
    [
        (
            "blocks.{l}.norm1 -> blocks.{l}.hook_resid_mid",
            "parts from upstream at blocks.0.hook_resid_mid",
            "blocks.0.norm2 : in -> blocks.0.hook_resid_mid",
        ),
        (
            "blocks.{l}.norm1 @ softmax -> blocks.{l}.attn.hook_pattern",
            "upstream shows nothing to compare with at",
            "blocks.0.attn.attn_drop : in -> blocks.0.attn.hook_pattern",
        ),
    ],
)
def test_doctor_says_which_row_is_wrong_where_logits_agree(row: str, says: str, place: str) -> None:
    upstream, adapter = built("plain")
    hook = row.partition(" -> ")[2]
    broken = Mutant("", "", "", hooks=lambda table: table.without(hook) | HookMap.parse(row))
    told = str(examine(Subject(CASES["plain"], Broken(adapter, broken), upstream)))
    assert says in told
    assert f"The row '{row}' reads another tensor; this one reads the right one: '{place}'." in told
    assert "makes it agree" not in told


def test_doctor_finds_nothing_wrong_with_what_is_right() -> None:
    diagnosis = diagnose(CASES["plain"])
    assert diagnosis.agrees
    assert diagnosis.compared > 20
