"""Formulas as authors write them: layouts of modules and parameters, attention without heads, activations, messages."""

from __future__ import annotations

import pytest
from prisma_conformance import CHECKS, check
from prisma_conformance.report.results import CheckResult
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject

from conformance_tests.helpers.cascade import CASE, ROWS, Cascade, CascadeAdapter


def result(old: str, new: str, name: str = "maps.proven") -> CheckResult:
    assert old in ROWS
    return run_check(CHECKS[name], Subject(CASE, CascadeAdapter(ROWS.replace(old, new)), Cascade(), seed=1))


def test_a_map_written_from_the_pages_passes_every_check() -> None:
    report = check(CASE, adapter=CascadeAdapter())
    assert report.passed, str(report)
    assert "hook points proven by equations" in report.certificate["maps.proven"].detail
    # Upstream has the fused kernel alone, so nothing of its own shows scores and pattern: equations prove them.
    assert "upstream shows no place for stages.{l}.blocks.{l}.attn.hook_attn_scores" in str(
        report.certificate["parity.hooks"].detail
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("conv_stage.{l}.gamma * ", "", "stages.0.blocks.0.hook_mlp_out = conv_stage.0.fc2(mlp.post): off by"),
        ("+ pos", "- pos", "stages.1.hook_placed = downsample - pos: off by"),
        ("hardswish(pre)", "hardsigmoid(pre)", "mlp.hook_post = hardsigmoid(pre): off by"),
        ("pool.queries . v", "pool.queries . attn_scores", "pool.hook_attn_scores = pool.queries . attn_scores"),
        ("q . k * {scale}", "k . q * {scale}", "attn.hook_attn_scores = k . q * 0.5"),
        (
            "pool.queries . v * pool.scale",
            "pool.queries . v",
            "pool.hook_attn_scores = pool.queries . v: off by",
        ),
    ],
)
def test_a_formula_that_does_not_hold_is_named_in_every_layout(old: str, new: str, says: str) -> None:
    found = result(old, new)
    assert not found.passed
    assert says in found.detail


def test_what_cannot_be_evaluated_says_what_it_reads() -> None:
    found = result("= mean(z)", "= conv_stage.0.gamma * z")
    assert "pool.hook_attn_out = conv_stage.0.gamma * z cannot be evaluated: RuntimeError" in found.detail
    assert "it reads conv_stage.0.gamma [10], z [2, 7, 12] (batch query_pos d_model)" in found.detail


def test_patterns_without_heads_have_their_equations_too() -> None:
    found = result("pool @ matmul#1 ", "pool @ softmax : in", "algebra")
    assert "pool.hook_z = pattern v" in found.detail


def test_a_row_out_of_order_is_told_where_it_belongs() -> None:
    lines = ROWS.splitlines()
    q, reduced = (next(n for n, line in enumerate(lines) if f"hook_{name} " in line) for name in ("q", "reduced"))
    lines[q], lines[reduced] = lines[reduced], lines[q]
    found = run_check(CHECKS["hooks.live"], Subject(CASE, CascadeAdapter("\n".join(lines)), Cascade(), seed=1))
    assert (
        "stages.1.blocks.0.attn.hook_q fires where hook_points() says stages.1.blocks.0.attn.hook_reduced: "
        "its row belongs before that one's" in found.detail
    )
