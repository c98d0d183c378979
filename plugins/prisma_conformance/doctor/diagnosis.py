"""The parity doctor: the first hook point that departs from upstream, and changes that would make it agree."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import inf

import torch
from torch import nn

from prisma_conformance import tolerances
from prisma_conformance.checks.parity import Comparison, compare
from prisma_conformance.doctor import suspects
from prisma_conformance.measure import worst
from prisma_conformance.report.results import Measured
from prisma_conformance.subject import Subject
from prisma_conformance.target import Target
from prisma_core import Size, ZooModel
from prisma_core.plugin import Adapter, AnySpec, HookMap, PrismaError, Reader, WeightMap


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
        problem: the error that made a comparison impossible.
        rows: where the logits agree and hook points do not, the rows of the hook map that read those.
        remedies: changes that make the first diverging hook point agree; those that make the logits agree too, if any
            does.
        tried: how many changes were tried.
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
    remedies: tuple[Remedy, ...] = ()
    tried: int = 0

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: the models could not be compared. {self.problem}"
        if self.agrees:
            return f"{self.name}: the logits and {self.compared} activations agree with upstream."
        at = f" at image size {'x'.join(map(str, self.size))}" if self.size else ""
        lines = [f"{self.name}: parts from upstream at {self.first}{at}, by {self.error:.1e} standard deviations."]
        if self.error == inf:
            lines = [f"{self.name}: upstream shows nothing to compare with at {self.first}."]
        if self.before:
            lines.append(f"Everything up to {self.before} agrees. The logits are off by {self.logits:.1e}.")
        for row in self.rows:
            lines.append(f"As the logits agree, the suspect is this row of the hook map: '{row}'.")
        if not self.remedies and not self.rows:
            lines.append(f"None of the {self.tried} usual suspects makes it agree.")
        for remedy in self.remedies:
            agrees = remedy.logits <= tolerances.FLOAT64
            logits = "and the logits" if agrees else f"but the logits stay off by {remedy.logits:.1e}"
            lines.append(f"It agrees, {logits}, with: {remedy.change}.")
        return "\n".join(lines)


def diagnose(
    target: Target,
    *,
    upstream: nn.Module | None = None,
    adapter: Adapter | None = None,
    device: torch.device | str | None = None,
    full: bool = False,
    pretrained: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Find where a mapped model departs from its upstream, and changes that would make it agree.

    >>> print(diagnose("timm:vit_tiny_patch16_224"))
    vit_tiny_patch16_224: the logits and 40 activations agree with upstream.

    Args:
        target, upstream, adapter, device, full, pretrained, seed: as ``check`` takes them; an adapter stands for its
            first case.
        progress: called with each change before it is tried, and first with a note where a full-size model is compared.

    Raises:
        UnknownName: no such reference or model.
        UnsupportedArchitecture: the model cannot be represented.
    """
    subject = next(
        Subject.of(
            target, upstream=upstream, adapter=adapter, device=device, full=full, pretrained=pretrained, seed=seed
        )
    )
    if progress is not None and subject.note:
        progress(subject.note)
    return examine(subject, progress=progress)


@torch.no_grad()
def examine(subject: Subject, progress: Callable[[str], None] | None = None) -> Diagnosis:
    """Diagnose a subject."""
    name = subject.case.name
    try:
        comparison = compare(subject)
        logits = _logits(subject, subject.sizes()[0])
    except Exception as problem:  # noqa: BLE001  # the doctor sees broken adapters: whatever they raise is the finding
        return Diagnosis(name=name, agrees=False, problem=f"{type(problem).__name__}: {problem}")
    first, before = _first_difference(comparison)
    different = [point for point, error in comparison.errors.items() if not error <= tolerances.FLOAT64]
    rows = _rows(subject, [*different, *comparison.unread]) if logits <= tolerances.FLOAT64 else ()
    if first is None and rows:
        first = next(iter(comparison.unread))
    size = None
    if first is None and logits > tolerances.FLOAT64:
        first = "hook_logits"
    if first is None:
        size = next((s for s in subject.sizes() if not _logits(subject, s) <= tolerances.FLOAT64), None)
        if size is None:
            return Diagnosis(name=name, agrees=True, logits=logits, compared=len(comparison.errors))
        first, before, logits = "hook_pos_embed", "hook_embed", _logits(subject, size)
    remedies, tried = _remedies(subject, first, size, progress)
    remedies = [remedy for remedy in remedies if remedy.logits <= tolerances.FLOAT64] or remedies
    error = logits
    if size is None:
        error = inf if first in comparison.unread else comparison.errors.get(first, logits)
    return Diagnosis(
        name=name,
        agrees=False,
        first=first,
        error=error,
        before=before,
        logits=logits,
        compared=len(comparison.errors),
        size=size,
        rows=rows,
        remedies=tuple(sorted(remedies, key=lambda remedy: remedy.here)),
        tried=tried,
    )


def _rows(subject: Subject, points: list[str]) -> tuple[str, ...]:
    """Rows of the hook map that read these points, as they are written."""
    table = subject.table()
    rows = (row for row in table.rows if HookMap((row,), table.sizes).bound(points))
    return tuple(f"{row.place} -> {row.hook}" for row in rows)


def _logits(subject: Subject, size: Size) -> float:
    upstream, model = subject.pair()
    inputs = subject.inputs(2, size)
    return worst(model(*inputs), subject.forward(upstream, *inputs))


def _first_difference(comparison: Comparison) -> tuple[str | None, str | None]:
    """Return the first hook point that differs, and the one before it."""
    before = None
    for name, error in comparison.errors.items():
        if not error <= tolerances.FLOAT64:
            return name, before
        before = name
    return None, before


def _remedies(
    subject: Subject, first: str, size: Size | None, progress: Callable[[str], None] | None
) -> tuple[list[Remedy], int]:
    remedies: list[Remedy] = []
    tried = 0
    if subject.form == "mapped":
        return remedies, tried  # upstream's own code runs, so there is no spec to change
    for suspect in suspects.usual(subject.spec, first, subject.pair().upstream):
        if progress is not None:
            progress(suspect.change)
        tried += 1
        try:
            variant = _altered(subject, suspect)
            logits = _logits(variant, size or subject.sizes()[0])
            here = logits if size else compare(variant).errors.get(first, logits)
        except (PrismaError, RuntimeError, ValueError, AttributeError):
            continue  # a change that does not fit this model's tensors is no remedy
        if here <= tolerances.FLOAT64:
            remedies.append(Remedy(change=suspect.change, here=here, logits=logits))
    return remedies, tried


def _altered(subject: Subject, suspect: suspects.Suspect) -> Subject:
    adapter = _Altered(subject.adapter, suspect.spec)

    def make(altered: Adapter, upstream: nn.Module) -> ZooModel:
        model = subject.make(altered, upstream)
        suspect.edit(model)
        return model

    return subject.variant(adapter, make)


class _Altered(Adapter):
    """An adapter with its spec changed."""

    types = ()

    def __init__(self, inner: Adapter, change: Callable[[AnySpec], AnySpec]):
        self.inner = inner
        self.change = change

    def spec(self, upstream: Reader) -> AnySpec:
        return self.change(self.inner.spec(upstream))

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        return self.inner.weights(upstream, spec)

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        return self.inner.hooks(upstream, spec)

    def stem(self, upstream: Reader, spec: AnySpec) -> nn.Module | None:
        return self.inner.stem(upstream, spec)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return self.inner.unfused_attention(upstream)


__all__ = ["Diagnosis", "Remedy", "diagnose", "examine"]
