"""Sentences of checks that no other broken adapter or model shows: each is seen here once."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from prisma_conformance import CHECKS, Case
from prisma_conformance.checks import live, running
from prisma_conformance.report.results import DeviceFailed
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor, nn
from twins import twin

from prisma_core import HookedViT, HookPoint
from prisma_core.hooks import point as points
from prisma_core.host import installed
from prisma_core.maps.places import HookMap

pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from .mistakes import biased_alone, forward
from .mutants import CASES, Cutting, Ignoring, Mutant, built, ignoring, parameters, point
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


class Coarse(HookPoint):
    """Moves the activation by a millionth where it is looked at."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * (1 + 1e-6) if self.wanted else x


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
        "looking at a pattern changes the number",
        "hooks.live",
        "a hook that changes nothing at hook_pattern moves the logits by",
        edit=point("blocks.0.attn.hook_pattern", Coarse),
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
        edit=forward("head", biased_alone),
    ),
    Mutant(
        "a gradient that is off by a millionth",
        "parity.gradients",
        "the gradient by head.bias differs by 1.0e-06",
        edit=forward("head", lambda part, own, x: own(x) + 1e-6 * (part.bias - part.bias.detach())),
    ),
    Mutant(
        "the gradient by a tensor that no row takes",
        "parity.gradients",
        "the gradient by head.bias differs by",
        table=ignoring("head.bias", "head.bias"),
    ),
    Mutant(
        "the image cut off",
        "parity.gradients",
        "no gradient reaches the input",
        edit=forward("embed.proj", lambda part, own, x: own(x.detach())),
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
    "what is returned is doubled": (
        "_hooked",
        "checked(copy if value is None else value",
        "checked(copy if value is None else 2 * value",
        "a hook that changes nothing at hook_",
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
    assert any(problem.startswith(says) for problem in live.live(Mutant("", "", "").subject()).problems)


def test_a_result_that_does_not_fit_has_to_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = 'return checked(copy if value is None else value, x, hook.at, "hook", what)'
    monkeypatch.setattr(points, "_hooked", twin(points._hooked, right, "return copy if value is None else value"))
    assert not run_check(CHECKS["hooks.live"], Mutant("", "", "").subject()).passed


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


def test_images_that_are_mixed_up_are_seen_where_there_are_several() -> None:
    case = Case("mixed", NorthViT, forward=lambda model, image: model(image)["logits"].roll(1, 0))
    result = run_check(CHECKS["parity.logits"], Subject(case, NorthAdapter(), NorthViT()))
    assert re.search(r"float64: logits differ by .*, batch 3 at 12x12", result.detail)


@pytest.mark.parametrize("row", ["blocks.{l}.hook_resid_pre", "blocks.{l}.hook_resid_post"])
def test_the_stream_of_each_block_has_rows(row: str) -> None:
    mutant = Mutant("", "", "", hooks=lambda table: table.without(row))
    result = run_check(CHECKS["parity.hooks"], mutant.subject())
    names = [row.replace("{l}", str(layer)) for layer in (0, 1)]
    assert result.detail == "; ".join(f"{name} is not in the hook map" for name in names)


def test_logits_are_compared_without_a_row() -> None:
    case = Case("doubled", NorthViT, forward=lambda model, image: 2 * model(image)["logits"])
    result = run_check(CHECKS["parity.hooks"], Subject(case, NorthAdapter(), NorthViT()))
    assert re.fullmatch(r"hook_logits differs by \S+", result.detail)


def test_the_features_of_a_tower_have_a_row() -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'prisma-interp[clip]'")
    case, _ = next(iter(installed().cases({"clip"})))
    upstream = case.build()

    class Without(type(installed().adapter(upstream))):  # type: ignore[misc]
        def hooks(self, upstream: Any, spec: Any) -> HookMap:
            return super().hooks(upstream, spec).without("vision.hook_logits")

    result = run_check(CHECKS["parity.hooks"], Subject(case, Without(), upstream))
    assert result.detail == "vision.hook_logits is not in the hook map"


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
