"""Result of the parity doctor, and its words."""

from __future__ import annotations

from math import inf

from prisma_conformance import tolerances
from prisma_conformance.report.results import Measured
from prisma_core import Size

MOST = 6  # lines of one kind


class Remedy(Measured):
    """A change that was tried.

    Attributes:
        change: in words, as the adapter's author would make it.
        here: the error it leaves at the first hook point that diverged.
        logits: the error it leaves in the logits.
    """

    change: str
    here: float
    logits: float


class Diagnosis(Measured):
    """Result of comparing a mapped model with upstream.

    Attributes:
        agrees: logits and every mapped activation equal upstream's.
        first: the first hook point that diverges, in firing order; None if none does.
        error: how far it is off, in standard deviations of upstream's activation.
        before: the last hook point that still agrees.
        logits: the error of the logits.
        compared: how many hook points were compared.
        size: the image size at which it shows, if it does not at the native one.
        problem: the error that made a comparison impossible, or possible only with ones and zeros in place of tensors.
        rows: where the logits agree and hook points do not, the rows of the hook map that read those; of a hook map
            without a weight map, the rows that feed equations that fail.
        places: rows that would read these hook points from a place that holds them; of a hook map without a weight map,
            the one change that makes all equations hold.
        equations: of a hook map without a weight map, those that fail.
        evidence: what the numbers say by themselves, in sentences.
        failures: other checks that fail, with what to do.
        remedies: changes that make the first diverging hook point agree; those that make the logits agree too, if any
            does.
        tried: how many changes were tried.
        then: what is left with the first of the remedies, where the logits still differ.
    """

    name: str
    agrees: bool
    first: str | None = None
    error: float = 0.0
    before: str | None = None
    logits: float = 0.0
    compared: int = 0
    size: Size | None = None
    problem: str | None = None
    rows: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    equations: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    tried: int = 0
    then: Diagnosis | None = None

    @property
    def healthy(self) -> bool:
        """Whether there is nothing to mend: the numbers agree, and the other checks pass."""
        return self.agrees and not self.failures and self.problem is None

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(d: Diagnosis) -> list[str]:
    lines: list[str] = []
    if d.problem:
        lines.append(f"{d.name}: the models could not be compared. {d.problem}")
        if d.first is None and not d.remedies:
            return lines + list(d.failures)
        lines.append("With every class taken as known, and ones and zeros in the place of what no row makes:")
    if d.equations:
        lines.append(f"{d.name}: {len(d.equations)} equations of the hook map fail, the first at {d.first}.")
        lines += d.equations[:MOST]
    elif d.agrees:
        lines.append(f"{d.name}: the logits and {d.compared} activations agree with upstream.")
    elif d.error == inf and d.rows:
        lines.append(f"{d.name}: upstream shows nothing to compare with at {d.first}.")
    elif d.first is not None:
        at = f" at image size {'x'.join(map(str, d.size))}" if d.size else ""
        by = "" if d.error == inf else f", by {d.error:.1e} standard deviations"
        lines.append(f"{d.name}: parts from upstream at {d.first}{at}{by}.")
    if d.before:
        lines.append(f"Everything up to {d.before} agrees. The logits are off by {d.logits:.1e}.")
    lines += d.evidence
    if d.equations:
        if d.places:
            return [*lines, f"All equations hold with: {d.places[0]}."]
        return [*lines, *(f"This row feeds them: '{row}'." for row in d.rows[:MOST])]
    if not d.agrees and not d.remedies and not d.places:
        lines += [f"As the logits agree, the suspect is this row of the hook map: '{row}'." for row in d.rows]
        if not d.rows:
            lines.append(f"None of the {d.tried} changes that were tried makes it agree.")
    for row, place in zip(d.rows, d.places, strict=False):
        lines.append(f"The row '{row}' reads another tensor; this one reads the right one: '{place}'.")
    for remedy in d.remedies:
        logits = f"but the logits stay off by {remedy.logits:.1e}"
        if remedy.logits <= tolerances.FLOAT64:
            logits = "and the logits"
        lines.append(f"It agrees, {logits}, with: {remedy.change}.")
    lines += d.failures
    if d.then is not None:
        lines += [f"With: {d.remedies[0].change}:", *(f"  {line}" for line in _lines(d.then))]
    return lines


__all__ = ["MOST", "Diagnosis", "Remedy"]
