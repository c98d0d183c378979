"""The parity doctor: the first hook point that departs from upstream, and changes that would make it agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import inf

import torch
from torch import nn

from prisma_conformance import tolerances
from prisma_conformance.doctor.advice import failures
from prisma_conformance.doctor.bench import Bench, Trial, attempt
from prisma_conformance.doctor.change import Change
from prisma_conformance.doctor.evidence import evidence, reordered
from prisma_conformance.doctor.families import families
from prisma_conformance.doctor.maps import absent_places, examine_map
from prisma_conformance.doctor.places import fitting
from prisma_conformance.doctor.result import MOST, Diagnosis
from prisma_conformance.doctor.search import Search
from prisma_conformance.doctor.tensors import feeding
from prisma_conformance.registry import select
from prisma_conformance.subject import Subject
from prisma_conformance.target import Target
from prisma_core import tensors_of
from prisma_core.maps.rule import Rule
from prisma_core.maps.table import pattern_of
from prisma_core.plugin import Adapter, HookMap, Row, check_call
from prisma_core.transformer.block import Block

STEPS = 4  # mistakes that are looked for one behind the other
AT_FAULT = ("weights.accounted", "spec.audit")  # what may say more where the numbers differ
OTHER = ("weights.*", "parity.gradients", "hooks.live", "algebra", "maps.proven", "spec.audit", "preprocess")


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
        InputError: an argument is of another type, or no such device is there.
    """
    if progress is not None:
        check_call(progress, 1, "progress", "a function of one argument")
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
    if subject.form == "mapped":
        return _of_map(subject, progress)
    problem = _problem(subject)
    try:
        bench = Bench(subject)
        trial = bench.run()
    except Exception as reason:  # noqa: BLE001  # the doctor sees broken adapters: whatever they raise is the finding
        return Diagnosis(name=name, agrees=False, problem=problem or f"{type(reason).__name__}: {reason}")
    diagnosis = _compared(bench, trial, progress, STEPS)
    if problem:
        return diagnosis.model_copy(update={"problem": problem, "agrees": False})
    if diagnosis.agrees or not (diagnosis.remedies or diagnosis.places):
        found = _failures(subject, OTHER if diagnosis.agrees else AT_FAULT)
        diagnosis = diagnosis.model_copy(update={"failures": found})
    return diagnosis


def _problem(subject: Subject) -> str | None:
    """What the adapter's own model, uncompleted, raises."""
    try:
        subject.passes()
    except Exception as reason:  # noqa: BLE001  # as above
        return f"{type(reason).__name__}: {reason}"
    return None


def _failures(subject: Subject, checks: Sequence[str] = OTHER) -> tuple[str, ...]:
    with torch.enable_grad():
        return tuple(failures(subject, select(checks)))


def _compared(bench: Bench, trial: Trial, progress: Callable[[str], None] | None, steps: int) -> Diagnosis:
    """Diagnose a model that runs, and what its best remedy leaves."""
    name, size = bench.subject.case.name, None
    if trial.agrees and (trial.first or trial.unread):
        return _of_rows(bench, trial, progress)
    first, before, logits = trial.first, trial.before, trial.logits
    if first is None and not trial.agrees:
        first = "hook_logits"
    if first is None:
        model, _ = bench.model()
        size = next((s for s in model.sizes() if not bench.logits(model, s) <= tolerances.FLOAT64), None)
        if size is None:
            return Diagnosis(name=name, agrees=True, logits=logits, compared=len(trial.errors))
        first, before, logits = "hook_pos_embed", "hook_embed", bench.logits(model, size)
    search = Search(bench, trial, first, size, progress)
    improvements = search.improvements()
    then = None
    if improvements and not improvements[0].whole and steps > 1:
        beyond = bench.on(improvements[0].change)
        then = _compared(beyond, beyond.run(), progress, steps - 1)
    return Diagnosis(
        name=name,
        agrees=False,
        first=first,
        compared=len(trial.errors),
        error=logits if size is not None else trial.errors.get(first, logits),
        before=before,
        logits=logits,
        size=size,
        evidence=()
        if improvements or size is not None
        else (
            *_conflicts(search),
            *_beyond(trial),
            *_evidence(bench, trial, first),
            *_output_columns(bench, trial, first),
            *_feeding(bench, trial, first),
        ),
        remedies=tuple(one.remedy for one in improvements[:MOST]),
        tried=search.tried,
        then=then,
    )


def _conflicts(search: Search) -> list[str]:
    """What one field of a spec cannot say: a value that mends one hook point and breaks another."""
    return [
        f"With {change.says}, it agrees, and {other} does not: one field stands for both. "
        "Refuse models in which the two differ: reader.expect(NAME=VALUE)."
        for change, other in [one for one in search.conflicts if one[0].spec is not Change.spec][:1]
    ]


def _beyond(trial: Trial) -> Iterator[str]:
    """Upstream's layers that rows with a mark would take, if the spec had a block for them."""
    sources = [(source, rule) for rule in trial.table.rows for source in rule.names if "{l}" in source]
    matches = [
        (match, rule) for name in trial.spare for one, rule in sources if (match := pattern_of(one).fullmatch(name))
    ]
    beyond = [match for match, rule in matches if not set(rule.bind(match.groupdict()).targets) & set(trial.shapes)]
    if layers := sorted({int(match["l"]) for match in beyond}):
        yield f"The rows with {{l}} would take upstream's layers {layers} too: the spec has too few blocks."


def _evidence(bench: Bench, trial: Trial, first: str) -> tuple[str, ...]:
    model, _ = bench.model()
    axes = model.hook_points()[first].axes.split()
    spare = {name: tensors_of(bench.upstream)[name] for name in trial.spare}
    if first not in trial.theirs:
        return ()
    return tuple(evidence(trial.ours[first], trial.theirs[first], axes, spare, bench.numbers))


def _output_columns(bench: Bench, trial: Trial, first: str) -> Iterator[str]:
    """The order in which an attention's output projection would have to read its heads, or their channels."""
    path = first.rpartition(".")[0]
    block = bench.model()[0].get_submodule(path)
    if first in trial.theirs and first.endswith("hook_attn_out") and isinstance(block, Block):
        z, attn = trial.ours[f"{path}.attn.hook_z"], block.attn
        addend = trial.theirs[first] / getattr(block.ls1, "gamma", 1.0)
        read = ((addend - attn.b_O) @ attn.W_O.flatten(0, 1).pinverse()).view(z.shape)
        yield from reordered(z, read, ("batch", "pos", "head", "d_head"), "Upstream's output projection reads z")


def _feeding(bench: Bench, trial: Trial, first: str) -> Iterator[str]:
    """The rows whose tensors make the first hook point that differs, and none before it."""
    before = list(trial.errors)[: list(trial.errors).index(first)] if first in trial.errors else []
    rows: dict[str, None] = {}
    beside: dict[str, None] = {}  # such as of queries, keys and values in one tensor, of which the values differ
    for names, change in feeding(bench.model()[0]):
        after = attempt(bench, change)
        if after is None or first not in after.ours or torch.equal(after.ours[first], trial.ours[first]):
            continue
        moved = [name for name in before if not torch.equal(after.ours[name], trial.ours[name])]
        if {name.rpartition(".")[0] for name in moved} <= {first.rpartition(".")[0]}:
            (beside if moved else rows).update({str(rule): None for rule in trial.table.rows if _makes(rule, names)})
    if rows := rows or beside:
        yield f"Rows whose tensors act here first: {', '.join(repr(row) for row in rows)}."


def _makes(rule: Rule, names: Sequence[str]) -> bool:
    return any(pattern_of(target).fullmatch(name) for target in rule.targets for name in names)


# -------------------------------------------------------------------- hook tables


def _of_rows(bench: Bench, trial: Trial, progress: Callable[[str], None] | None) -> Diagnosis:
    """Diagnose a model whose logits agree, and whose hook points do not."""
    different = [point for point, error in trial.errors.items() if not error <= tolerances.FLOAT64]
    points = [*different, *trial.unread]
    first = points[0]
    search = Search(bench, trial, first, None, progress)
    rows = _rows(trial, points)
    read = [_place(bench, trial, row) for row in rows]
    # What upstream shows at other places is right, or a tensor is exchanged with another: no fact makes that.
    weights_alone = bool(read) and None not in read
    improvements = [one for one in search.improvements(weights_alone) if one.whole] if different else []
    read = [] if improvements else read
    known = [(row, place) for row, place in zip(rows, read, strict=False) if place is not None]
    return Diagnosis(
        name=bench.subject.case.name,
        agrees=False,
        first=first,
        error=trial.errors.get(first, inf),
        before=trial.before if different else None,
        logits=trial.logits,
        compared=len(trial.errors),
        rows=tuple(_said(trial, row) for row in ([row for row, _ in known] or rows)),
        places=tuple(str(place) for _, place in known),
        evidence=() if improvements or known else tuple(_evidence(bench, trial, first)),
        remedies=tuple(one.remedy for one in improvements[:MOST]),
        tried=search.tried,
    )


def _rows(trial: Trial, points: list[str]) -> list[Row]:
    """The bound rows of hook points, one for each row of the table."""
    one_each = {family: next(iter(members.values())) for family, members in families(points).items()}
    return trial.hooks.bound(one_each.values())


def _said(trial: Trial, row: Row) -> str:
    """A row as it is written in the table."""
    written = (one for one in trial.hooks.rows if HookMap((one,), trial.hooks.sizes).bound([row.hook]))
    return next(f"{one.place} -> {one.hook}" + (f" : {one.how}" if one.function else "") for one in written)


def _place(bench: Bench, trial: Trial, row: Row) -> Row | None:
    """Find the place that holds the activation, the same in a row's layers."""
    places = bench.places()
    return fitting(row, trial.hooks, trial.ours[row.hook], places)


# -------------------------------------------------------------------- hooked upstreams


def _unmapped(subject: Subject, problem: str) -> Diagnosis:
    """Diagnose a hook map with which upstream cannot be hooked, or cannot run."""
    absent: tuple[str, ...] = ()
    with suppress(Exception):  # what is wrong may be in the adapter's other answers: the problem says it
        absent = tuple(absent_places(subject))
    return Diagnosis(name=subject.case.name, agrees=False, problem=problem, failures=absent[:MOST])


def _of_map(subject: Subject, progress: Callable[[str], None] | None) -> Diagnosis:
    name = subject.case.name
    try:
        findings = examine_map(subject, progress)
    except Exception as reason:  # noqa: BLE001  # as above
        return _unmapped(subject, f"{type(reason).__name__}: {reason}")
    if findings is None:
        compared = len(subject.passes().acts)
        return Diagnosis(name=name, agrees=True, compared=compared, failures=_failures(subject))
    return Diagnosis(
        name=name,
        agrees=False,
        first=findings.point,
        equations=findings.problems,
        rows=tuple(map(str, findings.rows)),
        places=(findings.change,) if findings.change else (),
        tried=findings.tried,
    )


__all__ = ["Diagnosis", "diagnose", "examine"]
