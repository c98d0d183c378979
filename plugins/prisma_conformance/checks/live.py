"""Liveness of hook points: each fires once, in order; what a hook returns is used; nothing is left behind."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from prisma_conformance import tolerances
from prisma_conformance.finding import Finding
from prisma_conformance.measure import worst
from prisma_conformance.subject import Inputs, Subject, differentiable
from prisma_core import HookContext, HookedUpstream, ZooModel
from prisma_core.plugin import HookError, HookMapping


def live(subject: Subject) -> Finding:
    """Run hooks of every kind at every hook point."""
    model = subject.fresh_model()
    inputs = subject.inputs(2)
    points = model.hook_points()
    plain = [name for name, point in points.items() if not point.derived]
    derived = [name for name, point in points.items() if point.derived]
    before = {name for name, point in points.items() if point.wanted}  # by scopes around the check: nothing ran yet
    with torch.no_grad():
        clean = model(*inputs)
        problems = [*_fires_once(model, inputs, plain), *_fires_once(model, inputs, derived)]
        if problems:
            return Finding(problems=tuple(problems))  # the tests below assume that each fires once
        error = _identity(model, inputs, clean, [*plain, *derived], problems)
        problems += _edits_reach(subject, model, inputs, plain, derived)
        problems += _in_place_equals_returned(subject, model, inputs, plain)
        problems += _nothing_left(model, inputs, clean, plain, before)
    # Derived points kind by kind: the inputs of each head bypass what reads the shared one.
    for names in (plain, *_kinds(derived).values()):
        problems += _gradients_flow(subject, model, inputs, names)
    detail = f"{len(plain)} hook points and {len(derived)} derived ones"
    return Finding(error, tolerances.routes(model.spec), tuple(problems), detail)


def _fires_once(model: ZooModel, inputs: Inputs, names: list[str]) -> list[str]:
    fired: list[str] = []

    def note(x: Tensor, at: HookContext) -> None:
        fired.append(at.name)

    if names:
        with suppress(HookError):  # a point that is not reached is an error; here it is counted
            model.run_with_hooks(*inputs, hooks=dict.fromkeys(names, note))
    problems = [f"{name} fires {fired.count(name)} times" for name in names if fired.count(name) != 1]
    order = [name for name in model.hook_points() if name in set(names)]
    if not problems and fired != order:
        where = next(index for index, (a, b) in enumerate(zip(fired, order, strict=True)) if a != b)
        row = ": its row belongs before that one's" if isinstance(model, HookedUpstream) else ""
        problems.append(f"{fired[where]} fires where hook_points() says {order[where]}{row}")
    return problems


def _kinds(names: list[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    return kinds


def _identity(model: ZooModel, inputs: Inputs, clean: Tensor, names: list[str], problems: list[str]) -> float:
    """Run hooks that change nothing; return the error of the logits, and add a problem for each kind that moves them.

    The logits are bit-equal, or equal to rounding where another kernel runs.
    """
    unfused = [name for name in names if name.rsplit(".", 1)[-1] in _UNFUSED]
    fused = [name for name in names if name not in set(unfused)]
    error = worst(model.run_with_hooks(*inputs, hooks=_unchanging(unfused)), clean) if unfused else 0.0
    unchanged = model.run_with_hooks(*inputs, hooks=_unchanging(fused))
    if _same(model, unchanged, clean) and error <= tolerances.routes(model.spec):
        return error
    for kind, members in _kinds(names).items():
        logits = model.run_with_hooks(*inputs, hooks=_unchanging(members))
        moved = worst(logits, clean)
        if not moved <= tolerances.routes(model.spec) or (kind not in _UNFUSED and not _same(model, logits, clean)):
            problems.append(f"a hook that changes nothing at {kind} moves the logits by {moved:.1e}")
    return error


def _same(model: ZooModel, ours: Tensor, theirs: Tensor) -> bool:
    # A hook gets a copy. On a GPU, the memory layout of numbers decides which kernel multiplies them.
    on_cpu = ours.device.type == "cpu"
    return torch.equal(ours, theirs) if on_cpu else worst(ours, theirs) <= tolerances.routes(model.spec)


def _unchanging(names: list[str]) -> HookMapping:
    return {name: _give_back if index % 2 else _give_nothing for index, name in enumerate(names)}


# Asking for these replaces a fused kernel, or one product with all heads, by explicit steps.
_STEPS = ("attn_scores", "pattern", "scale", "result", "q_input", "k_input", "v_input")
_UNFUSED = {f"hook_{name}" for name in _STEPS}


def _give_back(x: Tensor, at: HookContext) -> Tensor:
    return x


def _give_nothing(x: Tensor, at: HookContext) -> None:
    return None


def _edits_reach(subject: Subject, model: ZooModel, inputs: Inputs, plain: list[str], derived: list[str]) -> list[str]:
    """Edit each point in place, everything cached in the same pass: the cache holds the edit there, and not before."""
    problems: list[str] = []
    for group in (plain, *_kinds(derived).values()):
        # The same unfused kernels on both sides, so that what comes before must be the same to the bit.
        names = plain if group is plain else [*plain, *group]
        logits, cache = model.run_with_cache(*inputs, names=names)
        before = {key: value.clone() for key, value in cache.store.items()}
        for name in group:
            edit = _Noise(subject)
            edited, cache = model.run_with_cache(*inputs, names=names, hooks={name: edit.in_place})
            assert edit.result is not None  # a hook that does not run is an error of its scope
            if not torch.equal(cache.store[name], edit.result):
                problems.append(f"what a hook makes of {name} is not what goes on")
            for earlier in _earlier(model, names, name):
                if not torch.equal(cache.store[earlier], before[earlier]):
                    problems.append(f"an edit in place at {name} changes {earlier}, cached before it")
            if torch.equal(edited, logits):
                problems.append(f"an edit at {name} does not reach the output")
    return problems


def _earlier(model: ZooModel, names: list[str], name: str) -> list[str]:
    order = [point for point in model.hook_points() if point in set(names)]
    return order[: order.index(name)]


class _Noise:
    """Hooks that add the same noise, by an edit in place or a result.

    Attributes:
        result: copy of the activation after the last edit in place; None before the first.
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self.result: Tensor | None = None

    def noise(self, x: Tensor) -> Tensor:
        # Of the activation's size, and different in each entry: a shift of all scores leaves the softmax as is.
        drawn = torch.randn(x.shape, generator=self.subject.generator(6)).to(x)
        return drawn * (x[torch.isfinite(x)].abs().mean() + 1e-3)  # scores that a mask hides are minus infinity

    def in_place(self, x: Tensor, at: HookContext) -> None:
        x.add_(self.noise(x))
        self.result = x.clone()

    def returned(self, x: Tensor, at: HookContext) -> Tensor:
        return x + self.noise(x)


def _in_place_equals_returned(subject: Subject, model: ZooModel, inputs: Inputs, plain: list[str]) -> list[str]:
    noise = _Noise(subject)
    returned = model.run_with_hooks(*inputs, hooks=dict.fromkeys(plain, noise.returned))
    edited = model.run_with_hooks(*inputs, hooks=dict.fromkeys(plain, noise.in_place))
    return [] if torch.equal(returned, edited) else ["editing in place and returning give different logits"]


def _nothing_left(model: ZooModel, inputs: Inputs, clean: Tensor, plain: list[str], before: set[str]) -> list[str]:
    problems: list[str] = []

    class Oops(Exception):
        pass

    def fail(x: Tensor, at: HookContext) -> None:
        raise Oops

    def misshapen(x: Tensor, at: HookContext) -> Tensor:
        return x[:1, ..., :1].repeat(1, *[1] * (x.ndim - 1))

    for name in {plain[0], plain[len(plain) // 2], plain[-1]}:
        for hook, expected in ((fail, Oops), (misshapen, HookError)):
            try:
                model.run_with_hooks(*inputs, hooks={name: hook})
            except expected:
                pass
            else:
                problems.append(f"a hook at {name} that fails goes unseen ({expected.__name__} expected)")
            if not torch.equal(model(*inputs), clean):
                problems.append(f"after a hook at {name} has failed, logits stay changed")
    wanted = [name for name, point in model.hook_points().items() if point.wanted and name not in before]
    return problems + [f"{name} is still wanted after its scope has ended" for name in wanted]


def _gradients_flow(subject: Subject, model: ZooModel, inputs: Inputs, names: list[str]) -> list[str]:
    runs: list[str] = []

    def note(grad: Tensor, at: HookContext) -> None:
        runs.append(at.name)

    def loss(output: Any) -> Tensor:
        return (output * torch.randn(output.shape, generator=subject.generator(7)).to(output)).sum()

    _, cache = model.run_with_cache(*inputs, names=names, loss=loss)
    problems: list[str] = []
    grads = cache.grad
    assert grads is not None
    for name in names:
        grad = grads.store[name]
        if not bool(torch.isfinite(grad).all()):
            problems.append(f"the gradient by {name} is not finite")
        elif not bool(grad.any()):
            problems.append(f"no gradient reaches {name}")
    with model.hooks(backward=dict.fromkeys(names, note)):
        loss(model(*differentiable(inputs))).backward()
    for parameter in model.parameters():
        parameter.grad = None
    return problems + [f"the backward hook at {n} runs {runs.count(n)} times" for n in names if runs.count(n) != 1]
