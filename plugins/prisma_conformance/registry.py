"""The checks by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NoReturn

from prisma_conformance.checks import algebra, audit, live, maps, parity, proven, running, tensors
from prisma_conformance.finding import Check
from prisma_conformance.subject import Subject
from prisma_core.plugin import NotApplicable, UnknownName, expect, several, suggest


def _skip(reason: str) -> Callable[[Subject], NoReturn]:
    def run(subject: Subject) -> NoReturn:
        raise NotApplicable(reason)

    return run


_CHECKS = (
    Check(
        "parity.logits",
        "logits equal upstream's in float64, and err no more than upstream does in other dtypes",
        canonical=parity.logits,
        hooked=parity.logits,
    ),
    Check(
        "parity.hooks",
        "every activation in the hook map equals upstream's at that place, at every layer",
        canonical=parity.hooks,
        hooked=parity.hooks,
    ),
    Check(
        "parity.gradients",
        "gradients by the input and by every upstream weight equal upstream's, through the map",
        canonical=parity.gradients,
        hooked=maps.gradients,
    ),
    Check(
        "weights.accounted",
        "every tensor is mapped or rightly ignored; adapting leaves upstream as it was",
        canonical=tensors.accounted,
        hooked=maps.accounted,
    ),
    Check(
        "weights.roundtrip",
        "export reloads upstream with strict=True, bit for bit",
        canonical=tensors.roundtrip,
        hooked=tensors.roundtrip,
    ),
    Check(
        "hooks.live",
        "every hook point fires once, in order; edits are used, gradients flow, nothing is left behind",
        canonical=live.live,
        hooked=live.live,
    ),
    Check(
        "algebra",
        "each activation is what its equation makes of the others, and the parts sum to the logits",
        canonical=algebra.algebra,
        hooked=maps.algebra,
    ),
    Check(
        "maps.proven",
        "the equations of a hook map's rows hold, and noise at any hook point makes one fail",
        canonical=_skip("a hook map beside a weight map is proven by parity.hooks and algebra"),
        hooked=proven.proven,
    ),
    Check(
        "spec.audit",
        "every public attribute of upstream's modules is read, or ignored with a reason",
        canonical=audit.audit,
        hooked=_skip("no facts stand for upstream's: its own code runs"),
    ),
    Check(
        "preprocess",
        "the same image gives the same tensor as upstream's own transform",
        canonical=running.preprocess,
        hooked=running.preprocess,
    ),
    Check(
        "save.load",
        "a saved model comes back with the same facts, weights and logits",
        canonical=running.save_load,
        hooked=_skip("it runs as upstream's own module, which a file of facts and weights cannot hold"),
    ),
    Check(
        "threads",
        "two threads use one model with different hooks and do not see each other's",
        canonical=running.threads,
        hooked=running.threads,
    ),
    Check(
        "compile",
        "a model compiled with fullgraph=True has the same logits, caches and edits",
        canonical=running.compiled,
        hooked=maps.compiled,
        on_request=True,
    ),
)

CHECKS: Final[Mapping[str, Check]] = {check.name: check for check in _CHECKS}


def select(checks: str | Iterable[str] | None = None) -> list[Check]:
    """Select checks by names or globs; None for all but those that run on request only.

    Raises:
        UnknownName: a name or glob selects none.
        InputError: they are no names.
    """
    if checks is None:
        return [check for check in CHECKS.values() if not check.on_request]
    selected: set[str] = set()
    expected = "checks by name or glob"
    for query in [checks] if isinstance(checks, str) else several(checks, expected):
        expect(query, str, expected)
        names = [
            name
            for name, check in CHECKS.items()
            if name == query or (fnmatch.fnmatchcase(name, query) and not check.on_request)
        ]
        if not names:
            raise UnknownName(f"No check matches {query!r}. Checks: {', '.join(CHECKS)}.{suggest(query, CHECKS)}")
        selected.update(names)
    return [check for name, check in CHECKS.items() if name in selected]


__all__ = ["CHECKS", "select"]
