"""What other checks find, and what to do about each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress

from prisma_conformance.doctor.preprocessing import mended
from prisma_conformance.finding import Check
from prisma_conformance.report.results import CheckResult
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from prisma_core.maps.table import pattern_of
from prisma_core.plugin import Preprocess, PrismaError

TO_DO: dict[str, str] = {
    "parity.logits": "the dtype or the size in the message is what differs",
    "parity.hooks": "write the rows that are missing in the hook table",
    "parity.gradients": "upstream detaches something, or a tensor that no row takes matters",
    "weights.accounted": "map these tensors in the weight table, and the fact that they belong to in spec()",
    "weights.roundtrip": "rows run backwards too: give the lengths of axes in brackets to WeightMap.parse",
    "hooks.live": "this is about Prisma's own model, not about the adapter: please report it",
    "algebra": "two rows of the hook table are exchanged, or read before something is added",
    "spec.audit": "read it in spec() and refuse other values, reader.expect(NAME=VALUE); or, where it makes no number, "
    "name it in `ignored` with the reason: ignored = {'CLASS.NAME': 'why'}",
    "preprocess": "compare the fields of Preprocess with upstream's transform: size, crop, interpolation, mean, std",
    "save.load": "a fact of this model is in no field of its spec: refuse it in spec()",
    "threads": "something outside of the pass keeps state: the adapter's module, or a function of its tables",
}

CHANGED = "adapting changed upstream's"

# The same of models without a canonical form, where another thing is at fault.
TO_DO_OF_MAPS: dict[str, str] = {
    "hooks.live": "a row's place is one that not everything behind it reads, or is passed twice, or rows are not in "
    "the order in which they fire",
    "weights.accounted": "the adapter changes upstream, in a method or in a function of its tables: take copies there",
    "maps.proven": "write a formula behind '=' in the rows that are named, or their sides in equations()",
    "threads": "unfused_attention() changes something that other threads see",
}


def failures(subject: Subject, checks: Iterable[Check]) -> Iterator[str]:
    """Run checks, and yield what each that fails says, and what to do."""
    for one in checks:
        result = run_check(one, subject)
        if result.skipped is None and not result.passed:
            to_do = TO_DO | (TO_DO_OF_MAPS if subject.form == "mapped" else {})
            advice = (one.name == "preprocess" and _preprocess(subject)) or to_do.get(one.name)
            if CHANGED in result.detail:
                advice = TO_DO_OF_MAPS["weights.accounted"]
            yield f"{_said(result, subject)}{f' To do: {advice}.' if advice else ''}"


def _preprocess(subject: Subject) -> str | None:
    """The fields of a ``Preprocess`` that have to be others, where some make it agree."""
    with suppress(PrismaError):  # the check has said it
        ours, reference = subject.images() or (None, None)
        if isinstance(ours, Preprocess) and reference is not None and (fields := mended(ours, reference)):
            return f"it agrees with {fields}"
    return None


def _said(result: CheckResult, subject: Subject) -> str:
    rows = _rows(result.detail, subject) if result.name.startswith("weights.") else []
    by = f" Rows: {', '.join(rows)}." if rows else ""
    return f"{result.name} fails: {result.detail.removesuffix('.')}.{by}"


def _rows(detail: str, subject: Subject) -> list[str]:
    """The rows of the weight table that speak of the tensors in a message."""
    origin = subject.pair().model.origin
    words = set(re.findall(r"[\w.]+", detail))
    if origin is None:
        return []
    return [
        f"'{rule}'"
        for rule in origin.map.rows
        if str(rule) not in detail
        and any(pattern_of(name).fullmatch(word) for name in (*rule.names, *rule.targets) for word in words)
    ]


__all__ = ["TO_DO", "failures"]
