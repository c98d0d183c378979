"""Tokens behind the patches in the canonical form: every check passes, and a wrong function is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from prisma_conformance import check
from prisma_conformance.doctor.diagnosis import examine
from prisma_conformance.subject import Subject
from torch import Tensor

import prisma_core as prisma

from .tail import CASE, REGISTERS, TailAdapter, TailViT, turning


def test_registers_behind_the_patches_pass_every_check() -> None:
    report = check(CASE, adapter=TailAdapter())
    assert report.passed, str(report)
    model = prisma.adapt(TailViT().eval(), adapter=TailAdapter())
    assert model.layout.registers == REGISTERS
    image = torch.randn(1, 3, 12, 12)
    _, cache = model.run_with_cache(image)
    assert torch.equal(cache.patches("resid_post", 1), cache["resid_post", 1][:, REGISTERS:].unflatten(1, (3, 3)))


def test_tokens_as_upstream_has_them_are_not_what_a_hook_point_shows() -> None:
    report = check(CASE, adapter=TailAdapter({name: lambda x: x for name in ("stream",)}), checks="parity.*")
    (failed,) = report.failures
    assert failed.name == "parity.hooks"
    assert "blocks.0.hook_resid_pre differs by" in failed.detail


WRONG = [
    ("stream", turning(2, 1)["stream"], "blocks.0.hook_resid_pre", "another order of pos: ["),
    ("pattern", lambda x: x.roll(REGISTERS, -1), "blocks.0.attn.hook_attn_scores", "another order of query_pos: ["),
    (
        "heads",
        lambda x: x.roll(REGISTERS, 2),
        "blocks.0.attn.hook_q",
        "attn.q_norm -> blocks.{l}.attn.hook_q : {heads}'",
    ),
]


@pytest.mark.parametrize(("name", "function", "point", "says"), WRONG, ids=[each[0] for each in WRONG])
def test_the_doctor_names_a_wrong_function(
    name: str, function: Callable[[Tensor], Tensor], point: str, says: str
) -> None:
    answer = examine(Subject(CASE, TailAdapter({name: function}), TailViT(), seed=1))
    assert not answer.healthy
    assert answer.first == point
    assert says in str(answer), str(answer)
