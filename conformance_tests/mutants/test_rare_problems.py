"""Sentences of checks that no other broken adapter or model shows: each is seen here once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prisma_conformance import CHECKS, Case
from prisma_conformance.checks import axes, live, running
from prisma_conformance.finding import Finding
from prisma_conformance.measure import typical, worst
from prisma_conformance.report.results import Certificate, CheckResult, DeviceFailed, Report
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor, nn
from twins import twin
from windows import Adapter, Upstream

from prisma_core import HookedViT, HookPoint
from prisma_core.hooks import point as points
from prisma_core.maps.places import HookMap
from prisma_core.zoo import adapt_with

pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from .mutants import CASES, Cutting, Ignoring, Mutant, built, parameters, point
from .north import NorthAdapter, NorthViT


class Swallowing(HookPoint):
    """Goes on as if a hook that fails were none."""

    def __call__(self, x: Tensor) -> Tensor:
        try:
            return super().__call__(x)
        except Exception:  # noqa: BLE001  # that is the fault
            return x


class Lingering(HookPoint):
    """Stays wanted once it was."""

    def __call__(self, x: Tensor) -> Tensor:
        vars(self)["lingering"] = self.wanted
        return super().__call__(x)

    @property
    def wanted(self) -> bool:
        return vars(self).get("lingering", False) or super().wanted


class Infinite(HookPoint):
    """Has no finite derivative."""

    def __call__(self, x: Tensor) -> Tensor:
        y = super().__call__(x)
        return y + 0 * (y - y.detach()).abs().sqrt()


class Staying(HookPoint):
    """Changed for ever by other threads."""

    def __call__(self, x: Tensor) -> Tensor:
        vars(self)["used"] = vars(self).get("used", False) or threading.current_thread() is not threading.main_thread()
        return super().__call__(x) * (1.5 if vars(self)["used"] and not self.wanted else 1)


class AtHome(HookPoint):
    """Works in the main thread alone."""

    def __call__(self, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise ZeroDivisionError("not here")
        return super().__call__(x)


def _forward(path: str, wrong: Callable[..., Tensor]) -> Callable[[HookedViT], None]:
    """Return a change of the forward of a part; ``wrong`` takes the part, its own forward and the input."""

    def change(model: nn.Module) -> None:
        part = model.get_submodule(path)
        own = part.forward
        part.forward = lambda x: wrong(part, own, x)

    return change


def _biased_alone(part: Any, own: Any, x: Tensor) -> Tensor:
    return F.linear(x, part.weight, part.bias.detach())


def _infinite(model: HookedViT) -> None:
    for bias in parameters(model, "ln_final.bias"):
        bias.fill_(torch.inf)


MUTANTS = [
    Mutant(
        "a hook that fails in silence",
        "hooks.live",
        "a hook at hook_embed that fails goes unseen (Oops expected)",
        edit=point("hook_embed", Swallowing),
    ),
    Mutant(
        "a hook point that stays wanted",
        "hooks.live",
        "blocks.0.hook_resid_mid is still wanted after its scope has ended",
        edit=point("blocks.0.hook_resid_mid", Lingering),
    ),
    Mutant(
        "a gradient that is no number",
        "hooks.live",
        "the gradient by hook_embed is not finite",
        edit=point("blocks.0.hook_resid_pre", Infinite),
    ),
    Mutant(
        "an edit of what heads return ignored",
        "hooks.live",
        "an edit at blocks.0.attn.hook_result does not reach the output",
        edit=point("blocks.0.attn.hook_result", Ignoring),
    ),
    Mutant(
        "what heads return without a gradient",
        "hooks.live",
        "no gradient reaches blocks.0.attn.hook_result",
        edit=point("blocks.0.attn.hook_result", Cutting),
    ),
    Mutant(
        "the gradient of one weight cut off",
        "parity.gradients",
        "the gradient by head.bias differs by",
        edit=_forward("head", _biased_alone),
    ),
    Mutant(
        "the image cut off",
        "parity.gradients",
        "no gradient reaches the input",
        edit=_forward("embed.proj", lambda part, own, x: own(x.detach())),
    ),
    Mutant(
        "an infinite weight", "weights.accounted", "ln_final.bias holds values that are NaN or infinite", edit=_infinite
    ),
    Mutant(
        "a model that another thread changes",
        "threads",
        "hooks of a finished thread stay on the model",
        edit=point("blocks.0.hook_resid_post", Staying),
    ),
    Mutant(
        "a pass that fails in a thread",
        "threads",
        "a thread failed: ZeroDivisionError: not here",
        edit=point("blocks.0.hook_resid_post", AtHome),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_problem_is_seen_and_said(mutant: Mutant) -> None:
    result = run_check(CHECKS[mutant.check], mutant.subject())
    assert not result.passed
    assert mutant.says in result.detail


TWINS = {
    "an edit in place is lost": (
        "_hooked",
        "checked(copy if value is None else value",
        "checked(x if value is None else value",
        "editing in place and returning give different logits",
    ),
    "a cache holds something else": (
        "_fire",
        "capture(x)  #",
        "capture(1.001 * x)  #",
        "what a hook makes of blocks.1.attn.hook_z is not what goes on",
    ),
    "a backward hook does not run": (
        "_with_gradient_hooks",
        "y.register_hook(partial(",
        "print(partial(",
        "the backward hook at hook_embed runs 0 times",
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_fault_of_hook_points_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, right, wrong, says = TWINS[name]
    monkeypatch.setattr(points, function, twin(getattr(points, function), right, wrong))
    assert says in live.live(Mutant("", "", "").subject()).problems


class Narrow(HookPoint):
    """Loses digits where it is looked at."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.to(torch.float8_e4m3fn).to(x.dtype) if self.wanted else x)


class Wide(HookPoint):
    """Shows more digits than there are."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.float()).to(x.dtype)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Narrow, "errs by"),
        (Wide, "blocks.0.hook_resid_mid is cached as torch.float32"),
    ],
)
def test_what_a_cache_does_to_half_precision_is_seen(kind: type[HookPoint], says: str) -> None:
    upstream, adapter = built("plain")
    mutant = Mutant("", "", "", edit=point("blocks.0.hook_resid_mid", kind))
    subject = Subject(CASES["plain"], adapter, upstream, make=mutant.make, dtypes=[torch.bfloat16])
    problems = [one for one in run_check(CHECKS["parity.logits"], subject).detail.split("; ") if "cached" in one]
    assert len(problems) == 1
    assert says in problems[0]


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_an_upstream_that_proves_nothing_is_said(value: float) -> None:
    case = Case("constant", NorthViT, forward=lambda model, image: torch.full((len(image), 7), value).double())
    result = run_check(CHECKS["parity.logits"], Subject(case, NorthAdapter(), NorthViT()))
    assert "upstream's output is constant or NaN: these weights prove nothing" in result.detail


def test_weights_that_upstream_loads_in_another_way_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: NorthViT, state: Any, **options: Any) -> None:
        nn.Module.load_state_dict(self, state, **options)
        self.head.bias.data.add_(1)

    subject = Subject(Case("north", NorthViT), NorthAdapter(), NorthViT())
    assert run_check(CHECKS["weights.roundtrip"], subject).passed
    monkeypatch.setattr(NorthViT, "load_state_dict", load, raising=False)
    result = run_check(CHECKS["weights.roundtrip"], subject)
    assert result.detail == "the reloaded upstream gives other logits"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda model: setattr(model, "spec", model.spec.model_copy(update={"d_pool": 1})),
            "the spec comes back changed",
        ),
        (lambda model: None, ""),
        (lambda model: model.head.bias.data.add_(1e-12), "head.bias comes back changed"),
    ],
)
def test_what_a_file_changes_is_seen(change: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = running.load

    def load(reference: str) -> Any:
        model = real(reference)
        change(model)
        return model

    monkeypatch.setattr(running, "load", load)
    result = run_check(CHECKS["save.load"], Subject(Case("north", NorthViT), NorthAdapter(), NorthViT()))
    assert result.passed == (not says)
    assert says in result.detail


def test_a_device_that_breaks_ends_the_run() -> None:
    def broken(*_: object) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nwas encountered")

    subject = Subject(Case("north", NorthViT, forward=broken), NorthAdapter(), NorthViT())
    with pytest.raises(DeviceFailed, match=r"cpu failed in parity\.logits of north.*unusable.*illegal memory access$"):
        run_check(CHECKS["parity.logits"], subject)


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
    assert "test_rare_problems.Dropout.p = 0.1 at 'norm.dropped' is neither read" in problems


class Recognising(NorthAdapter):
    """Asks for the class of a part, and for nothing of it."""

    def spec(self, upstream: Any) -> Any:
        upstream.norm.dropped.expect(f"{__name__}.Dropout")
        return super().spec(upstream)


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
            lambda upstream, model: _forward("head", _biased_alone)(model.upstream),
            "the gradient by head.bias is lost or invented",
        ),
        (
            "parity.gradients",
            lambda upstream, model: _forward("head", lambda part, own, x: own(x) + part.bias - part.bias.detach())(
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
