"""Diagnosis of hook maps: equations that fail, the rows that feed them, and places at which those would hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.checks.equations import UNEVALUATED, Equation, MapEquations
from prisma_conformance.doctor.places import all_places, readings
from prisma_conformance.measure import worst
from prisma_conformance.subject import Subject
from prisma_core.maps.places import INSIDE
from prisma_core.plugin import FUSED, HookMap, MapAdapter, Place, Reader, Row, suggest
from prisma_core.toolbox.tables import numbered

Acts = Mapping[str, Tensor]


class MapFindings(NamedTuple):
    """What is wrong with a hook map.

    Attributes:
        point: the first hook point of an equation that fails.
        problems: the equations that fail.
        rows: those that feed them.
        change: other rows, with which all of these hold; empty if none were found.
        tried: how many were tried.
    """

    point: str
    problems: tuple[str, ...]
    rows: tuple[Row, ...]
    change: str
    tried: int


@torch.no_grad()
def examine_map(subject: Subject, progress: Callable[[str], None] | None = None) -> MapFindings | None:
    """Find the equations of a hook map that fail, and rows that would mend them; None if all hold.

    Raises:
        Exception: whatever the adapter raises, or a model that it makes.
    """
    equations = MapEquations(subject)
    every = {str(one): one for one in (*equations.everywhere, *equations.rows)}
    _, problems = equations.evaluate(list(every.values()))
    failing = _failing(equations, equations.clean.after)
    if not problems and not failing:
        return None
    wrong = [one for text, one in every.items() if any(problem.startswith(text) for problem in problems)]
    points = [point for several in failing.values() for point in several]
    points += [point for one in wrong for point in (one.point, *sorted(one.reads))]
    rows = tuple(equations.scope.rows[point] for point in dict.fromkeys(points))
    said = dict.fromkeys([*problems, *(text for text in failing if text not in every)])
    if all(UNEVALUATED in problem for problem in problems) and failing.keys() <= every.keys():  # no place mends that
        return MapFindings(rows[0].hook, _one_each(said), rows, "", 0)
    change, tried = _change(subject, equations, rows, failing, progress)
    return MapFindings(rows[0].hook, _one_each(said), rows, change, tried)


def _one_each(problems: Iterable[str]) -> tuple[str, ...]:
    """The first of problems that differ in numbers alone, with how many more there are."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        alike.setdefault(re.sub(r"[\d.e+-]+", "#", problem), []).append(problem)
    return tuple(first + (f" (and {len(more)} more like it)" if more else "") for first, *more in alike.values())


def _numbered(subject: Subject) -> HookMap:
    table = subject.table()
    return HookMap(tuple(numbered(table, subject.pair().upstream)), table.sizes)


def _failing(equations: MapEquations, acts: Acts, among: Collection[str] | None = None) -> dict[str, tuple[str, ...]]:
    """The equations that fail on activations of a plain pass, each with the hook points in it.

    Args:
        among: those that are looked at; None for all.
    """
    failing: dict[str, tuple[str, ...]] = {}
    formulas = {str(one): one for one in (*equations.everywhere, *equations.rows)}
    for text, one in formulas.items():
        looked = among is None or text in among
        if looked and equations.reason(text) is None and not _holds(one, acts):
            failing[text] = (one.point, *sorted(one.reads))
    if among is not None and formulas.keys() >= set(among):
        return failing  # an adapter evaluates all of its equations or none
    for text, error in equations.of_adapter(acts).items():
        if equations.reason(text) is None and not error <= tolerances.FLOAT64:
            failing[text] = tuple(_mentioned(text, equations))
    return failing


def _mentioned(text: str, equations: MapEquations) -> Iterator[str]:
    """Hook points of the part whose name an equation of an adapter begins with."""
    part = text.partition(":")[0].partition(" = ")[0].strip()
    part = part.rpartition(".")[0] if part in equations.scope.rows else part
    yield from (point for point in equations.scope.rows if point.rpartition(".")[0] == part)


def _holds(equation: Equation, acts: Acts) -> bool:
    try:
        return equation.error(acts, acts) <= tolerances.FLOAT64
    except Exception:  # noqa: BLE001  # upstream's modules refuse shapes in their own ways
        return False


def _change(
    subject: Subject,
    equations: MapEquations,
    rows: tuple[Row, ...],
    failing: Mapping[str, tuple[str, ...]],
    progress: Callable[[str], None] | None,
) -> tuple[str, int]:
    """Find one row at another place, or two that exchange theirs, with which every equation holds."""
    upstream, table = subject.pair().upstream, _numbered(subject)
    acts = equations.clean.after
    places = all_places(upstream, lambda: subject.forward(upstream, *equations.inputs))
    tried = 0
    for candidate in (*_exchanged(rows, acts), *_moved(rows, table, places, acts)):
        if progress is not None:
            progress(" and ".join(map(str, candidate)))
        tried += 1
        after = {**acts, **{row.hook: tensor for row, tensor in candidate.items()}}
        if failing:
            helps = _helps(equations, after, failing)
        else:  # the numbers are right, and only what hangs on them is not: a place that not everything reads
            helps = all(worst(after[row.hook], acts[row.hook]) <= tolerances.FLOAT64 for row in candidate)
        if helps and _mends(subject, table, tuple(candidate)):
            were = " and ".join(f"'{equations.scope.rows[row.hook]}'" for row in candidate)
            return f"{' and '.join(repr(str(row)) for row in candidate)} (instead of {were})", tried
    return "", tried


def _helps(equations: MapEquations, acts: Acts, failing: Collection[str]) -> bool:
    """Whether an equation that failed holds for other activations."""
    try:
        return bool(set(failing) - set(_failing(equations, acts, failing)))
    except Exception:  # noqa: BLE001  # equations of adapters do not expect other shapes
        return False


def _moved(
    rows: tuple[Row, ...], table: HookMap, places: Mapping[Place, Tensor], acts: Acts
) -> Iterator[dict[Row, Tensor]]:
    """Each row with each other place, or with another pattern."""
    for row in rows:
        for other, tensor in readings(row, table, places, len(acts[row.hook])):
            if (other.place, other.how) != (row.place, row.how):
                yield {other: tensor}


def _exchanged(rows: tuple[Row, ...], acts: Acts) -> Iterator[dict[Row, Tensor]]:
    for one, other in combinations(rows, 2):
        yield {
            replace(one, place=other.place, how=other.how): acts[other.hook],
            replace(other, place=one.place, how=one.how): acts[one.hook],
        }


def _mends(subject: Subject, table: HookMap, rows: tuple[Row, ...]) -> bool:
    """Whether all equations hold for the map with other rows, edited hook points included."""
    by_hook = {row.hook: row for row in rows}
    changed = HookMap(tuple(by_hook.get(row.hook, row) for row in table.rows), table.sizes)
    try:
        equations = MapEquations(subject.variant(Moved(subject.adapter, changed), subject.make))
        _, problems = equations.evaluate([*equations.everywhere, *equations.rows])
        return not problems and not _failing(equations, equations.clean.after)
    except Exception:  # noqa: BLE001  # a place that this model does not have, or has elsewhere
        return False


@torch.no_grad()
def absent_places(subject: Subject) -> Iterator[str]:
    """Yield the rows of a hook map whose place upstream never passes, with the nearest of its places.

    Raises:
        Exception: whatever the adapter or upstream raises.
    """
    upstream = subject.upstream()
    bare = subject.make(Moved(subject.adapter, HookMap(())), upstream)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in bare.sample_inputs(2))
    places = all_places(upstream, lambda: subject.forward(upstream, *inputs))
    fused = [place.module for place in places if place.function == FUSED]
    known = {*map(str, places), *(f"{module} @ {FUSED} : {side}" for module in fused for side in INSIDE)}
    for row in numbered(subject.adapter.hooks(Reader(upstream), bare.spec), upstream):
        if str(row.place) not in known:
            yield f"The row '{row}' names a place that upstream never passes.{suggest(str(row.place), known)}"


class Moved(MapAdapter):
    """A map adapter with another table."""

    types = ()

    def __init__(self, inner: Any, table: HookMap):
        self.inner = inner
        self.table = table

    def spec(self, upstream: Reader) -> Any:
        return self.inner.spec(upstream)

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return self.table

    def reference_places(self, upstream: Reader) -> HookMap:
        return self.inner.reference_places(upstream)

    def equations(self, upstream: Reader, acts: Acts) -> Iterator[tuple[str, Tensor, Tensor]]:
        return self.inner.equations(upstream, acts)

    def exempt(self, upstream: Reader) -> dict[str, str]:
        return self.inner.exempt(upstream)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return self.inner.unfused_attention(upstream)

    def output(self, result: Any) -> Tensor:
        return self.inner.output(result)


__all__ = ["MapFindings", "examine_map"]
