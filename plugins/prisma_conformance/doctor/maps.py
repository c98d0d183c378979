"""Diagnosis of hook maps: equations that fail, the rows that feed them, and places at which those would hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.checks.equations import Equation, MapEquations
from prisma_conformance.doctor.places import all_places, readings
from prisma_conformance.subject import Subject
from prisma_core.plugin import HookMap, MapAdapter, PrismaError, Reader, Row

Acts = Mapping[str, Tensor]


class MapFindings(NamedTuple):
    """What is wrong with a hook map.

    Attributes:
        point: the first hook point of an equation that fails.
        problems: the equations that fail.
        rows: those that feed them.
        changes: other rows, with which all of these hold.
        tried: how many places were tried.
    """

    point: str
    problems: tuple[str, ...]
    rows: tuple[Row, ...]
    changes: tuple[str, ...]
    tried: int


@torch.no_grad()
def examine_map(subject: Subject, progress: Callable[[str], None] | None = None) -> MapFindings | None:
    """Find the equations of a hook map that fail, and rows that would mend them; None if all hold.

    Raises:
        Exception: whatever the adapter raises, or a model that it makes.
    """
    equations = MapEquations(subject)
    failing = list(_failing(equations))
    every = [*equations.everywhere, *equations.rows]
    _, problems = equations.evaluate(every)
    if not problems and not failing:
        return None
    said = [*problems, *(text for text, _ in failing if text not in {str(one) for one in every})]
    points = [point for _, several in failing for point in several]
    points = points or [one.point for one in every if any(text.startswith(str(one)) for text in problems)]
    points = list(dict.fromkeys(points))
    rows = tuple(equations.scope.rows[point] for point in points)
    changes, tried = _changes(subject, equations, rows, progress)
    return MapFindings(points[0], tuple(said), rows, changes, tried)


def _failing(equations: MapEquations) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Equations that fail on a plain pass, with the hook points in them."""
    for one in (*equations.everywhere, *equations.rows):
        if equations.reason(str(one)) is None and not _holds(one, equations.clean.after):
            yield str(one), (one.point, *sorted(one.reads))
    for text, error in equations.of_adapter(equations.clean.after).items():
        if equations.reason(text) is None and not error <= tolerances.FLOAT64:
            yield text, tuple(_mentioned(text, equations))


def _mentioned(text: str, equations: MapEquations) -> Iterator[str]:
    """Hook points in the part that an equation of an adapter begins with the name of."""
    part = text.partition(":")[0].partition(" = ")[0].strip()
    part = part.rpartition(".")[0] if part in equations.scope.rows else part
    yield from (point for point in equations.scope.rows if point.rpartition(".")[0] == part)


def _holds(equation: Equation, acts: Acts) -> bool:
    try:
        return equation.error(acts, acts) <= tolerances.FLOAT64
    except Exception:  # noqa: BLE001  # upstream's modules refuse shapes in their own ways
        return False


def _changes(
    subject: Subject, equations: MapEquations, rows: tuple[Row, ...], progress: Callable[[str], None] | None
) -> tuple[tuple[str, ...], int]:
    upstream, table = subject.pair().upstream, subject.table()
    acts = equations.clean.after
    places = all_places(upstream, lambda: subject.forward(upstream, *equations.inputs))
    before = {text for text, _ in _failing(equations)}
    mending: list[str] = []
    tried = 0
    for candidate in (*_moved(rows, table, places, acts), *_exchanged(rows, acts)):
        if progress is not None:
            progress(" and ".join(map(str, candidate)))
        tried += 1
        after = {**acts, **{row.hook: tensor for row, tensor in candidate.items()}}
        if before and not before - _still(equations, after):
            continue
        if _mends(subject, table, tuple(candidate)):
            were = " and ".join(repr(str(row)) for row in rows if row.hook in {one.hook for one in candidate})
            mending.append(f"{' and '.join(map(repr, map(str, candidate)))} (instead of {were})")
    return tuple(dict.fromkeys(mending)), tried


def _moved(rows: tuple[Row, ...], table: HookMap, places: Any, acts: Acts) -> Iterator[dict[Row, Tensor]]:
    """Each row with each other place that holds a tensor of the same shape."""
    for row in rows:
        shape = acts[row.hook].shape
        for other, tensor in readings(row, table, places, len(acts[row.hook])):
            if other.place != row.place and tensor.shape == shape:
                yield {other: tensor}


def _exchanged(rows: tuple[Row, ...], acts: Acts) -> Iterator[dict[Row, Tensor]]:
    for i, one in enumerate(rows):
        for other in rows[i + 1 :]:
            if acts[one.hook].shape == acts[other.hook].shape:
                yield {
                    Row(other.place, one.hook, other.how, one.equation): acts[other.hook],
                    Row(one.place, other.hook, one.how, other.equation): acts[one.hook],
                }


def _still(equations: MapEquations, acts: Acts) -> set[str]:
    """The equations that fail on changed activations."""
    texts = {str(one) for one in (*equations.everywhere, *equations.rows) if not _holds(one, acts)}
    return texts | {text for text, error in equations.of_adapter(acts).items() if not error <= tolerances.FLOAT64}


def _mends(subject: Subject, table: HookMap, rows: tuple[Row, ...]) -> bool:
    """Whether all equations hold for the map with other rows, edited hook points included."""
    by_hook = {row.hook: row for row in rows}
    changed = HookMap(tuple(by_hook.get(row.hook, row) for row in table.rows), table.sizes)
    try:
        equations = MapEquations(subject.variant(Moved(subject.adapter, changed), subject.make))
        _, problems = equations.evaluate([*equations.everywhere, *equations.rows])
        return not problems and not list(_failing(equations))
    except (PrismaError, RuntimeError, ValueError, KeyError):
        return False


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
