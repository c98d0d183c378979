"""The kit's own parts: selection, drawn weights, certificates, the table, and every kind of target."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from prisma_conformance import (
    CHECKS,
    Case,
    Certificate,
    CheckFailed,
    CheckResult,
    check,
    diagnose,
    randomise,
    read_certificates,
    select,
    write_certificates,
)
from prisma_conformance.measure import worst
from prisma_conformance.pytest import summary
from prisma_conformance.report.table import supported, write_table
from prisma_conformance.subject import Subject
from prisma_conformance.tolerances import FLOAT64
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import PrismaError, UnknownName
from prisma_core.host import installed
from prisma_core.spec import TextPoolSpec, TextSpec
from prisma_core.transformer import HookedText

pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from .mutants import CASES, built
from .north import HOOKS, NorthAdapter, NorthViT
from .table import MUTANTS

pytest_plugins = ["pytester"]
EXCHANGED = HOOKS.replace("attn.q_norm  ", "attn.k_norm  ", 1)  # queries read where keys are
FAST = ["parity.logits", "weights.*"]


def test_checks_are_selected_by_name_and_glob() -> None:
    assert [one.name for one in select("weights.*")] == ["weights.accounted", "weights.roundtrip"]
    assert {one.name for one in select()} == set(CHECKS) - {"compile"}
    assert [one.name for one in select("compile")] == ["compile"]
    with pytest.raises(UnknownName, match=r"Did you mean parity\.logits"):
        select("parity.logit")


def test_draws_are_the_same_for_a_seed_and_leave_nothing_at_its_default() -> None:
    upstream, _ = built("plain")
    before = copy.deepcopy(upstream.state_dict())
    once, again, other = (randomise(copy.deepcopy(upstream), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    for name, tensor in once.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name]), name
        assert tensor.std() > 0.05, name
    eps = [part.eps for part in once.modules() if hasattr(part, "eps")]
    assert len(set(eps)) == len(eps) > 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in upstream.state_dict().items())


def test_every_kind_of_target_is_checked() -> None:
    upstream, adapter = built("plain")
    own = check(upstream, checks=FAST)
    assert own.passed, str(own)
    assert own.certificate.weights == "own"
    hooked = prisma.adapt(upstream)
    assert check(hooked, upstream=upstream, checks=FAST).passed
    with pytest.raises(PrismaError, match="upstream=module"):
        check(hooked)
    case = check(CASES["plain"], adapter=adapter, checks=FAST)
    assert case.passed
    assert case.certificate.weights == "random"
    with pytest.raises(UnknownName):
        check("no-such-reference")


def test_an_adapter_of_another_type_is_said_to_be_one() -> None:
    _, adapter = built("plain")
    with pytest.raises(PrismaError, match=r"adapts .*VisionTransformer.*; what is to be checked is a .*\.Eva"):
        check(CASES["rotary"], adapter=adapter, checks=FAST)
    with pytest.raises(PrismaError, match="whose types name it"):
        diagnose(CASES["rotary"], adapter=adapter)


def test_what_hardly_varies_is_measured_by_its_size() -> None:
    constant = torch.full((5, 7), 3.0, dtype=torch.float64)
    assert worst(constant * (1 + 1e-15), constant) < FLOAT64
    assert worst(constant * (1 + 1e-9), constant) > FLOAT64
    varied = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert worst(varied + 0.5 * varied.std(), varied) == pytest.approx(0.5)


def test_weights_as_they_are_built_prove_what_drawn_ones_do() -> None:
    pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")
    (case,) = (one for one, _ in installed().cases({"hf"}) if one.name == "PixtralVisionModel")
    report = check(case.build(), checks="algebra")
    assert report.passed, str(report)


@torch.no_grad()
def test_texts_of_one_token_can_be_drawn() -> None:
    spec = TextSpec.plain(layers=1, n_ctx=1, pad_id=1, pool=TextPoolSpec(kind="eos", eos_id=3), n_classes=None)
    model = HookedText(spec)
    for size in model.sizes():
        (tokens,) = model.sample_inputs(4, size=size)
        assert tokens.tolist() == [[3]] * 4
        assert model(tokens).shape == (4, 12)


def test_the_suite_s_options_stand_beside_those_of_others(pytester: pytest.Pytester) -> None:
    theirs = """
        def pytest_addoption(parser):
            for name in ("--device", "--dtype"):
                parser.addoption(name)
    """
    pytester.makeconftest("pytest_plugins = ['prisma_conformance.pytest']")
    pytester.makepyfile(theirs=theirs, test_it="def test_it(request): assert request.config.option.device == 'iPhone'")
    pytester.syspathinsert()
    given = ("--device", "iPhone", "--conformance-device", "cpu", "--conformance-dtype", "float32")
    pytester.runpytest_inprocess("-p", "theirs", *given).assert_outcomes(passed=1)


def test_a_hooked_model_is_checked_with_its_present_weights() -> None:
    upstream, _ = built("plain")
    hooked = prisma.adapt(upstream)
    with torch.no_grad():
        hooked.head.bias.add_(1)
    subject = next(Subject.of(hooked, upstream=upstream))
    assert torch.equal(subject.base.head.bias, hooked.head.bias)
    assert not torch.equal(upstream.head.bias, hooked.head.bias)


def test_a_parameter_that_upstream_rounds_to_float32_is_seen() -> None:
    """In a model of numbers that float32 holds, it would not be."""

    def rounding(upstream: nn.Module, image: Tensor) -> Tensor:
        other = copy.deepcopy(upstream)
        other.positions.copy_(other.positions.float())
        return other(image)["logits"]

    for forward in (None, rounding):
        report = check(Case("rounds", NorthViT, forward=forward), adapter=NorthAdapter(), checks="parity.logits")
        assert report.passed == (forward is None), str(report)
    assert "float64: logits differ" in report.certificate["parity.logits"].detail


@pytest.mark.parametrize("shared", ["", "attn", "norm1"])
def test_a_part_used_twice_is_compared_under_each_of_its_names(shared: str) -> None:
    def build() -> nn.Module:
        model = NorthViT()
        if shared:
            setattr(model.layers[1], shared, getattr(model.layers[0], shared))
        else:
            model.layers[1] = model.layers[0]
        return model

    right, wrong = (check(Case("twice", build), adapter=NorthAdapter(hooks=hooks)) for hooks in (HOOKS, EXCHANGED))
    assert right.passed, str(right)
    assert right.certificate["parity.hooks"].detail.startswith("34 of 52 ")
    (failed,) = (result for result in wrong.results if not result.passed and not result.skipped)
    assert failed.name == "parity.hooks"
    assert "blocks.1.attn.hook_q differs" in failed.detail


def test_a_failed_report_raises_with_the_numbers() -> None:
    subject = next(mutant for mutant in MUTANTS if mutant.name == "q and k swapped").subject()
    report = check(CASES["plain"], adapter=subject.adapter, checks="parity.logits")
    report.raise_for_failures()  # the mistake is in the making, not in the adapter
    wrong = next(mutant for mutant in MUTANTS if mutant.name == "tanh gelu for erf gelu").subject()
    report = check(CASES["plain"], adapter=wrong.adapter, checks="parity.logits")
    with pytest.raises(CheckFailed, match=r"plain: parity\.logits: FAILED error .*e-0"):
        report.raise_for_failures()


def test_certificates_and_the_table_made_of_them(tmp_path: Path) -> None:
    certificate = check(CASES["averaged"], checks=FAST).certificate
    failed = certificate.model_copy(
        update={"name": "broken", "results": (CheckResult(name="parity.logits", passed=False, error=0.5, bound=1e-10),)}
    )
    path = write_certificates([failed, certificate], tmp_path / "timm.jsonl")
    back = read_certificates(path)
    assert [one.name for one in back] == ["averaged", "broken"]
    assert back[0].passed
    assert not back[1].passed
    assert back[0].facts == certificate.facts
    page = write_table(tmp_path).read_text(encoding="utf-8")
    assert page == supported(back)
    assert "1 of 2 architectures pass" in page
    assert "| broken | 5e-01 |  |  | 0 of 1; fails parity.logits |" in page


def test_the_summary_counts_what_ran() -> None:
    passed = CheckResult(name="parity.logits", passed=True, error=1e-12, bound=1e-10)
    skipped = CheckResult(name="preprocess", passed=False, skipped="no transform")
    common = {"upstream": "a.B", "library": "a", "version": "1", "torch": "2"}
    certificates = [
        Certificate(name="x", facts="1", results=(passed, skipped), **common),
        Certificate(
            name="y", facts="1", results=(passed.model_copy(update={"passed": False, "error": 1.0}),), **common
        ),
    ]
    lines = summary("zoo", 3, certificates)
    assert lines[0] == "1 of 2 zoo architectures passed, with 1 distinct combinations of facts; 1 more was not selected"
    assert lines[1].strip() == "parity.logits: 1 of 2, worst error 1.0e+00 of at most 1e-10"
    assert lines[2].strip() == "preprocess: 0 of 0; 1 skipped: no transform"


@pytest.mark.parametrize(
    "names", [("q_norm", "k_norm"), ("qn", "kn"), ("norm_q", "norm_k"), ("query_norm", "key_norm")]
)
def test_norms_of_queries_and_keys_are_drawn_one_eps_by_whatever_name(names: tuple[str, str]) -> None:
    parts = nn.ModuleDict({name: nn.LayerNorm(4) for name in (*names, "norm1", "norm2")})
    model = randomise(nn.ModuleDict({"layers": nn.ModuleList([parts])}), torch.Generator().manual_seed(0))
    q, k, norm1, norm2 = (part.eps for part in model.layers[0].values())
    assert q == k
    assert len({q, norm1, norm2}) == 3
