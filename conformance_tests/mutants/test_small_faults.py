"""What numbers, findings and audits say where little is wrong; hooked upstreams that are others; axes out of order."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from prisma_conformance import CHECKS, Case, Images, randomise
from prisma_conformance.checks import axes
from prisma_conformance.finding import Finding
from prisma_conformance.measure import typical, worst
from prisma_conformance.report.results import Certificate, CheckResult, Report
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from prisma_conformance.tolerances import FLOAT64, routes
from torch import Tensor, nn
from windows import Adapter, Upstream

from prisma_core.inputs import Preprocess
from prisma_core.maps.places import HookMap
from prisma_core.spec import ModelSpec, NormSpec
from prisma_core.zoo import adapt_with

from .mistakes import biased_alone, forward
from .north import NorthAdapter, NorthViT


class Dropout(nn.Module):
    """No class of torch's, whatever its name is."""

    def __init__(self) -> None:
        super().__init__()
        self.p = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_attributes_are_excused_in_torchs_own_classes_alone() -> None:
    upstream = NorthViT()
    upstream.norm.drop, upstream.norm.dropped = nn.Dropout(), Dropout()
    problems = run_check(CHECKS["spec.audit"], Subject(Case("north", NorthViT), Recognising(), upstream, seed=1)).detail
    assert problems.count("neither read nor ignored") == 1
    assert "test_small_faults.Dropout.p = 0.1 at 'norm.dropped' is neither read" in problems


class Recognising(NorthAdapter):
    """Asks for the class of a part, and for nothing of it."""

    def spec(self, upstream: Any) -> Any:
        upstream.norm.dropped.expect(f"{__name__}.Dropout")
        return super().spec(upstream)


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Shifted(NorthViT):
    def __init__(self) -> None:
        super().__init__()
        self.shift = Shift()


def test_a_part_without_weights_has_to_be_read() -> None:
    class Unaware(NorthAdapter):
        types = (f"{__name__}.Shifted",)

    detail = run_check(CHECKS["spec.audit"], Subject(Case("shifted", Shifted), Unaware(), Shifted(), seed=1)).detail
    assert detail == f"{__name__}.Shifted.shift (Shift) is neither read nor ignored with a reason"


@pytest.mark.parametrize("number", range(5))
def test_preprocessing_is_compared_on_each_image(number: int) -> None:
    ours, calls = Preprocess(size=(12, 16)), count()
    images = Images(ours, lambda image: ours.prepared(image) + (next(calls) == number))
    case = Case("north", NorthViT, images=lambda upstream: images)
    result = run_check(CHECKS["preprocess"], Subject(case, NorthAdapter(), NorthViT()))
    assert result.detail.startswith("an image of ")
    assert result.detail.count("differs by 1.0e+00") == 1


def test_saved_buffers_are_drawn_and_constants_stay() -> None:
    module = nn.BatchNorm1d(5)
    module.register_buffer("constant", torch.ones(5), persistent=False)
    randomise(module, torch.Generator().manual_seed(0))
    assert module.running_mean.std() > 0.05
    assert (module.running_var > 0).all()
    assert module.running_var.std() > 0.05
    assert module.constant.equal(torch.ones(5))


# -------------------------------------------------------------------- what a number and a report say


def test_what_cannot_be_compared_is_as_wrong_as_can_be() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    hidden = x.masked_fill(x < 0, -torch.inf)
    for measure in (worst, typical):
        assert measure(x, x) == 0
        assert measure(x, x[:1]) == measure(x[0], x) == torch.inf
        assert measure(x * torch.nan, x) == measure(x, x * torch.nan) == torch.inf
    assert worst(x[:0], x[:0]) == 0
    assert worst(hidden, hidden) == worst(hidden, x.masked_fill(x < 0, torch.finfo(x.dtype).min)) == 0
    assert worst(x, hidden) == worst(hidden, x) == torch.inf


def test_what_rounds_to_float32_is_allowed_its_rounding_and_no_more() -> None:
    exact, rounding = (
        ModelSpec.plain(norm=NormSpec(eps=1e-5, in_float32=rounds), layers=1) for rounds in (False, True)
    )
    assert routes(exact) == FLOAT64
    assert 10 * torch.finfo(torch.float32).eps < routes(rounding) < 1e-4


@pytest.mark.parametrize(
    ("error", "problems", "passed"),
    [
        (0.5, (), True),
        (1.0, (), True),
        (1.5, (), False),
        (float("nan"), (), False),
        (None, (), True),
        (0.5, ("x",), False),
    ],
)
def test_a_finding_passes_within_its_bound_alone(error: float | None, problems: tuple[str, ...], passed: bool) -> None:
    assert Finding(error, 1.0, problems).passed == passed


def test_nothing_that_ran_is_no_pass() -> None:
    facts = {"name": "x", "upstream": "a.B", "library": "a", "version": "1", "torch": "2"}
    right, skipped, wrong = (
        CheckResult(name="x", passed=one == 0, skipped="why" if one == 1 else None) for one in range(3)
    )
    for results, passed in (((), False), ((skipped,), False), ((right, skipped), True), ((right, wrong), False)):
        certificate = Certificate(**facts, results=results)
        assert certificate.passed == Report(certificates=(certificate,)).passed == passed
    assert not Report(certificates=()).passed


# -------------------------------------------------------------------- hooked upstreams


@pytest.mark.parametrize(
    ("check", "change", "says"),
    [
        (
            "weights.accounted",
            lambda upstream, model: upstream.head.bias.data.add_(1),
            "adapting or running changed upstream's head.bias",
        ),
        (
            "weights.accounted",
            lambda upstream, model: upstream.head.register_forward_hook(lambda *_: None),
            "changed upstream's head._forward_hooks",
        ),
        (
            "weights.accounted",
            lambda upstream, model: setattr(upstream.head, "forward", upstream.head.forward),
            "changed upstream's head.forward",
        ),
        (
            "weights.accounted",
            lambda upstream, model: upstream.head.bias.requires_grad_(False),
            "changed upstream's head.bias.requires_grad",
        ),
        ("weights.accounted", lambda upstream, model: model.upstream.head.bias.data.add_(1), "head.bias differs"),
        (
            "parity.gradients",
            lambda upstream, model: forward("head", biased_alone)(model.upstream),
            "the gradient by head.bias is lost or invented",
        ),
        (
            "parity.gradients",
            lambda upstream, model: forward("head", lambda part, own, x: own(x) + part.bias - part.bias.detach())(
                model.upstream
            ),
            "the gradient by head.bias differs by 1.0",
        ),
    ],
)
def test_a_hooked_upstream_that_is_another_is_seen(check: str, change: Any, says: str) -> None:
    def make(adapter: Any, upstream: nn.Module) -> Any:
        model = adapt_with(adapter, upstream)
        change(upstream, model)
        return model

    result = run_check(CHECKS[check], Subject(Case("toy", Upstream), Adapter(), Upstream().eval(), make=make))
    assert says in result.detail


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("batch pos d_model", []),
        ("pos batch d_model", ["hook_x has the axes 'pos batch d_model': expected 'batch' first"]),
        ("batch d_model pos", ["hook_x has the axes 'batch d_model pos': expected what begins with 'd_' last"]),
    ],
)
def test_axes_out_of_order_are_named(names: str, says: list[str]) -> None:
    (row,) = HookMap.parse(f"place -> hook_x : {names}").rows
    assert list(axes.misnamed({row.hook: row}, {row.hook: torch.zeros(2, 3, 4)}, torch.zeros(2, 3))) == says


def test_an_attention_with_heads_has_them_in_its_vectors() -> None:
    table = HookMap.parse("""
        scores -> attn.hook_attn_scores : batch head query_pos key_pos
        q      -> attn.hook_q           : batch pos group d_head
    """)
    (said,) = axes.misnamed({row.hook: row for row in table.rows}, {}, torch.zeros(2, 3))
    assert said == "attn.hook_q has the axes 'batch pos group d_head': expected 'head', as scores have it"
