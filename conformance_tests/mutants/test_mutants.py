"""The kit catches what it claims to catch, and passes what is right."""

from __future__ import annotations

import re

import pytest

from prisma_core.conformance import CHECKS, diagnose
from prisma_core.conformance.doctor import examine
from prisma_core.conformance.run import run_check
from prisma_core.conformance.subject import Subject

pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from .mutants import CASES, Mutant, built
from .table import MUTANTS

RAISED = re.compile(r"[A-Z]\w*: ")  # what run_check makes of an exception


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_mutant_is_caught_by_the_check_that_claims_it(mutant: Mutant) -> None:
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
        pytest.skip(result.skipped)
    assert result.passed, str(result)


def test_every_check_has_a_mutant() -> None:
    assert {mutant.check for mutant in MUTANTS} == set(CHECKS)


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.remedy], ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_doctor_says_what_would_help(mutant: Mutant) -> None:
    diagnosis = examine(mutant.subject())
    assert not diagnosis.agrees
    assert diagnosis.remedies, str(diagnosis)
    assert mutant.remedy in str(diagnosis), str(diagnosis)


def test_doctor_finds_nothing_wrong_with_what_is_right() -> None:
    diagnosis = diagnose(CASES["plain"])
    assert diagnosis.agrees
    assert diagnosis.compared > 20
