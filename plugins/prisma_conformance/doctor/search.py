"""Search for changes of an adapter that make it agree with upstream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from prisma_conformance import tolerances
from prisma_conformance.doctor.bench import Bench, Trial, attempt
from prisma_conformance.doctor.change import Change
from prisma_conformance.doctor.facts import facts
from prisma_conformance.doctor.families import families
from prisma_conformance.doctor.layouts import layouts
from prisma_conformance.doctor.pooling import pooling
from prisma_conformance.doctor.result import Remedy
from prisma_conformance.doctor.rotary import rotary
from prisma_conformance.doctor.rows import extended, missing, missing_modules, reshaped, rows
from prisma_conformance.doctor.tensors import tensors
from prisma_core import Size

DEEPEST = 4  # rows that a change of a fact may ask for


class Improvement(NamedTuple):
    """A change that helps.

    Attributes:
        change: what was changed.
        here: the error that it leaves at the first hook point that differed.
        logits: the error that it leaves in the logits.
        reaches: the place, among the hook points, of the first that still differs.
        whole: whether nothing is left to mend.
    """

    change: Change
    here: float
    logits: float
    reaches: int
    whole: bool

    @property
    def remedy(self) -> Remedy:
        """It, as a diagnosis reports it."""
        return Remedy(change=self.change.says, here=self.here, logits=self.logits)


class Search:
    """Search on one bench, for one difference.

    Args:
        bench: upstream, and the adapter.
        trial: the adapter as it is.
        first: the hook point that differs.
        size: the size of inputs at which it does, where it does not at the native one.
        progress: called with each change before it is tried.

    Attributes:
        tried: how many changes were tried.
        conflicts: changes that mend the hook point and break one before it, which agreed, each with that one.
    """

    def __init__(
        self, bench: Bench, trial: Trial, first: str, size: Size | None, progress: Callable[[str], None] | None
    ):
        self.bench = bench
        self.trial = trial
        self.first = first
        self.size = size
        self.progress = progress
        self.tried = 0
        self.conflicts: list[tuple[Change, str]] = []
        self.start = list(trial.errors).index(first) if size is None and first in trial.errors else 0
        self.end = len(trial.errors) + len(trial.unread) + 100  # behind all hook points, those of other parts too

    def improvements(self, weights_alone: bool = False) -> list[Improvement]:
        """Changes that make the difference go away, the best alone.

        Changes are tried until one leaves nothing to mend; else the kinds of changes are, one after the other, until
        one mends the logits.

        Args:
            weights_alone: try changes of the weight table and of tensors, and none of facts.
        """
        helpful: list[Improvement] = []
        for kind in self._of_weights() if weights_alone else self._kinds():
            for one in (one for change in kind for one in self._tried(change)):
                helpful.append(one)
                if one.whole and one.reaches == self.end:
                    return [one]
            if any(one.whole for one in helpful):
                helpful = [one for one in helpful if one.whole]
                break
        best = max((one.reaches for one in helpful), default=0)
        helpful = [one for one in helpful if one.reaches == best]
        return helpful if any(one.whole for one in helpful) else helpful[:1]

    def _kinds(self) -> Iterator[Iterator[Change]]:
        trial, theirs, ours = self.trial, self.bench.shapes, self.trial.shapes
        yield reshaped(trial.gaps, trial.table, theirs, ours)
        yield extended(trial.gaps, trial.table, theirs, ours, (*trial.spare, "zeros"))
        yield missing_modules(trial.gaps, theirs, ours, trial.spare)
        yield missing(trial.gaps, theirs, ours, trial.spare)
        if trial.tokens is None or trial.tokens[0] != trial.tokens[1]:
            yield layouts(trial.spec, trial.tokens and trial.tokens[1])
        yield facts(trial.spec, self.first, self.bench.numbers, trial.spare)
        yield pooling(trial.spec)
        yield rotary(trial.spec, self.first, trial.ours, trial.theirs)
        yield from self._of_weights()

    def _of_weights(self) -> Iterator[Iterator[Change]]:
        yield rows(self.trial.table, self.bench.shapes, self.trial.shapes, self.trial.spare)
        yield tensors(self.bench.model()[0])

    def _tried(self, change: Change, depth: int = 0) -> Iterator[Improvement]:
        """Try a change; where it asks for tensors that no row makes, with rows from tensors that none takes."""
        if self.progress is not None:
            self.progress(change.says)
        self.tried += 1
        if (after := attempt(self.bench, change)) is None:
            return
        gaps = [name for name in after.gaps if name not in self.trial.gaps]
        if not gaps:
            yield from self._helps(change, after)
        elif depth < DEEPEST:
            names = next(iter(families(gaps).values())).values()
            shapes, spare = self.bench.shapes, after.spare
            for row in (
                *missing_modules(gaps, shapes, after.shapes, spare),
                *missing(list(names), shapes, after.shapes, spare),
                *extended(list(names), after.table, shapes, after.shapes, [x for x in spare if x in self.trial.spare]),
            ):
                yield from self._tried(change.then(row), depth + 1)

    def _helps(self, change: Change, after: Trial) -> Iterator[Improvement]:
        logits, here = after.logits, after.errors.get(self.first, after.logits)
        if self.size is not None:
            here = logits = self.bench.logits(self.bench.model(change)[0], self.size)
        # Where the logits agree from the start, the hook points are what is to be mended.
        whole = logits <= tolerances.FLOAT64 and not (self.trial.agrees and self.size is None and after.first)
        if here <= tolerances.FLOAT64 or whole:
            reaches = self.end if after.first is None else list(after.errors).index(after.first)
            if after.first is not None and reaches < self.start and not whole:
                self.conflicts.append((change, after.first))
            else:
                yield Improvement(change, here, logits, reaches, whole)


__all__ = ["Improvement", "Search"]
