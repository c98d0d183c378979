"""Equations of a hooked upstream: those that hold in every model, those of its map's rows, and those of its adapter."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from prisma_conformance import tolerances
from prisma_conformance.checks.formulas import Acts, Formula, Scope
from prisma_conformance.checks.grammar import Prose
from prisma_conformance.measure import worst
from prisma_conformance.subject import Subject
from prisma_core import HookContext, ZooModel
from prisma_core.plugin import MapAdapter, PrismaError, Reader, blaming, returned
from prisma_core.toolbox.tables import numbered

UNEVALUATED = " cannot be evaluated"
OUTPUT = "output"  # upstream's, among the activations that went on

# For each hook point the formulas that may hold of it. The first whose names are all in the same part does.
EVERYWHERE: Mapping[str, tuple[str, ...]] = {
    "hook_resid_mid": ("shortcut + attn_out", "resid_pre + attn_out"),
    "hook_resid_post": (
        "resid_mid + mlp_out",
        "shortcut + attn_out + mlp_out",
        "resid_pre + attn_out + mlp_out",
        "shortcut + mlp_out",
        "resid_pre + mlp_out",
    ),
    "hook_pattern": ("softmax(attn_scores)",),
    "hook_z": ("pattern v",),
}


class Equation(Protocol):
    """Equation of a hook point; ``str`` is what reports and ``MapAdapter.exempt`` call it."""

    point: str
    reads: set[str]

    def error(self, left: Acts, right: Acts) -> float:
        """Distance of the hook point in ``left`` from the equation's value on ``right``."""
        ...


class Written:
    """An equation that is no formula.

    Attributes:
        point: the hook point.
        text: the right side, in words.
        sides: both sides, of the activations before and after every hook point.
    """

    def __init__(self, point: str, text: str, sides: Callable[[Acts, Acts], tuple[Tensor, Tensor]]):
        self.point = point
        self.text = text
        self.sides = sides
        self.reads: set[str] = set()

    def error(self, left: Acts, right: Acts) -> float:
        return worst(*self.sides(left, right))

    def __str__(self) -> str:
        return f"{self.point} = {self.text}"


class Passed(NamedTuple):
    """Activations of one pass on both sides of every hook point.

    Attributes:
        before: what upstream passed to it.
        after: what went on, and upstream's output as ``output``; the same where nothing was edited.
    """

    before: Acts
    after: Acts


def edited_pass(
    model: ZooModel, inputs: tuple[Tensor, ...], points: Sequence[str], generator: torch.Generator
) -> Passed:
    """Run a model with noise added at these hook points."""
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}

    def hook(x: Tensor, at: HookContext) -> Tensor:
        before[at.name] = x.clone()
        after[at.name] = x + noise(x, generator) / 4
        return after[at.name].clone()

    output = model.run_with_hooks(*inputs, hooks=dict.fromkeys(points, hook))
    return Passed(before, after | {OUTPUT: output})


class MapEquations:
    """Everything that is said about the hook points of a hooked upstream.

    Attributes:
        everywhere: what holds in every model with hook points of these names.
        rows: formulas behind the ``=`` of the map's rows.
        prose: the texts that are no formula, by hook point, with the reason.
        exempt: hook points and equations, as globs, that the adapter leaves out, with the reasons.
    """

    def __init__(self, subject: Subject):
        assert isinstance(subject.adapter, MapAdapter)
        self.subject = subject
        self.adapter = subject.adapter
        upstream, self.model = subject.pair()
        self.inputs, logits, acts = subject.passes()
        table = subject.table()
        rows = {row.hook: row for row in numbered(table, upstream)}
        self.scope = Scope(rows, {**table.sizes, "batch": len(self.inputs[0])}, upstream, self.inputs)
        self.clean = Passed(acts, acts | {OUTPUT: logits})
        self.everywhere: list[Equation] = list(self._everywhere())
        self.rows: list[Equation] = []
        self.prose: dict[str, str] = {}
        for row in rows.values():
            if row.equation:
                try:
                    self.rows.append(Formula(row.hook, row.equation, self.scope))
                except Prose as reason:
                    self.prose[row.hook] = f"{row.equation!r} is prose: {reason}"
        with blaming(self.adapter):
            self.exempt: Mapping[str, str] = returned(self.adapter.exempt, self.adapter.exempt(Reader(upstream)), dict)

    def _everywhere(self) -> Iterator[Equation]:
        for point in self.scope.rows:
            part, _, last = point.rpartition(".")
            for text in EVERYWHERE.get(last, ()):
                names = [f"{part}.hook_{name}".lstrip(".") for name in re.findall(r"[a-z]\w*(?![\w(])", text)]
                if all(name in self.scope.rows for name in names):
                    yield Formula(point, text, self.scope)
                    break
            if last == "hook_pattern":
                yield Written(point, "rows that sum to 1", lambda left, right, p=point: _normalised(left[p]))
            if (match := re.fullmatch(r"(.*blocks\.)(\d+)\.hook_resid_pre", point)) and match[2] != "0":
                before = f"{match[1].removesuffix('.')}.{int(match[2]) - 1}.resid_post"
                if self.scope.point(before, "") is not None:
                    yield Formula(point, before, self.scope)
            if point == "hook_logits":
                yield Written(point, "the output", lambda left, right: (right["hook_logits"], right[OUTPUT]))

    @cached_property
    def edited(self) -> Passed:
        """Run the model with noise added at every hook point.

        An equation then holds between what came to a hook point and what went on from those it reads: only if each of
        them is a place that everything behind it reads.
        """
        return edited_pass(self.model, self.inputs, list(self.scope.rows), self.subject.generator(8))

    def evaluate(self, equations: Sequence[Equation]) -> tuple[dict[str, float], list[str]]:
        """Evaluate equations on a plain pass and on an edited one, those left out that are exempt.

        Returns the largest error of each, and the problems of those that fail or cannot be evaluated.
        """
        errors: dict[str, float] = {}
        problems: list[str] = []
        for equation in equations:
            if self.reason(str(equation)) is not None:
                continue
            for passed, when in ((self.clean, ""), (self.edited, ", with every hook point edited")):
                try:
                    error = equation.error(*passed)
                except Exception as problem:  # noqa: BLE001  # upstream's modules refuse shapes in their own ways
                    kind = "" if isinstance(problem, PrismaError) else f"{type(problem).__name__}: "
                    problems.append(f"{equation}{UNEVALUATED}: {kind}{problem}")
                    break
                errors[str(equation)] = max(error, errors.get(str(equation), 0.0))
                if not error <= tolerances.FLOAT64:
                    problems.append(f"{equation}{when}: off by {error:.1e}")
                    break
        return errors, problems

    def reason(self, name: str) -> str | None:
        """Why an equation or a hook point is exempt; None if it is not."""
        return next((reason for key, reason in self.exempt.items() if fnmatch.fnmatchcase(name, key)), None)

    def of_adapter(self, acts: Acts) -> dict[str, float]:
        """Evaluate the adapter's own equations on activations; return the error of each."""
        errors: dict[str, float] = {}
        for text, left, right in self.adapter.equations(Reader(self.scope.upstream), acts):
            errors[text] = max(errors.get(text, 0.0), worst(left, right))
        return errors

    def defines(self, point: str) -> bool:
        """Whether an equation says what a hook point is: a formula of its own, or one of the adapter's."""
        x = self.clean.after[point]
        noisy = self.of_adapter({**self.clean.after, point: x + noise(x, self.subject.generator(9))})
        named = any(one.point == point and isinstance(one, Formula) for one in (*self.rows, *self.everywhere))
        return named or any(not error <= tolerances.FLOAT64 for error in noisy.values())

    def prover(self, point: str) -> str | None:
        """Find an equation that fails once noise is added to a hook point, its own first; None if there is none."""
        x = self.clean.after[point]
        acts = {**self.clean.after, point: x + noise(x, self.subject.generator(9))}
        for equation in sorted((*self.rows, *self.everywhere), key=lambda one: one.point != point):
            reads = point == equation.point or point in equation.reads
            if reads and self.reason(str(equation)) is None and _fails(equation, acts):
                return str(equation)
        for text, error in self.of_adapter(acts).items():
            if self.reason(text) is None and not error <= tolerances.FLOAT64:
                return text
        return None


def _fails(equation: Equation, acts: Acts) -> bool:
    try:
        return not equation.error(acts, acts) <= tolerances.FLOAT64
    except Exception:  # noqa: BLE001  # it is reported where equations are evaluated, and once is enough
        return True


def noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw noise of an activation's size; scores that a mask hides are minus infinity, and stay so."""
    return torch.randn(x.shape, generator=generator).to(x) * (x[torch.isfinite(x)].abs().mean() + 1e-3)


def _normalised(pattern: Tensor) -> tuple[Tensor, Tensor]:
    return pattern, pattern / pattern.sum(-1, keepdim=True)


__all__ = ["UNEVALUATED", "Equation", "MapEquations", "Passed", "edited_pass", "noise"]
