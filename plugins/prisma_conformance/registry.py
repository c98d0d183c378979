"""The checks by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prisma_conformance.report.results import Precision
from prisma_core.errors import PrismaError, UnknownName, suggest

if TYPE_CHECKING:
    from prisma_conformance.subject import Subject


class NotApplicable(PrismaError):
    """Raised by a check that cannot apply to a subject: a skip, with the reason."""


@dataclass(frozen=True)
class Finding:
    """What a check hands back.

    Attributes:
        error, bound: the largest error, and what it may be at most.
        problems: anything else that is wrong; each one fails the check.
        detail: what was looked at.
        precisions: what came out in dtypes other than float64.
    """

    error: float | None = None
    bound: float | None = None
    problems: tuple[str, ...] = ()
    detail: str = ""
    precisions: tuple[Precision, ...] = ()

    @property
    def passed(self) -> bool:
        # A NaN error is no pass.
        return not self.problems and (self.error is None or self.bound is None or self.error <= self.bound)


@dataclass(frozen=True)
class Check:
    """One thing the kit proves.

    Attributes:
        name: dotted, what one selects it by.
        proves: one line for reports and docs.
        on_request: too slow to run unless it is selected by its name.
    """

    name: str
    proves: str
    run: Callable[[Subject], Finding]
    on_request: bool = False


CHECKS: dict[str, Check] = {}


def register(
    name: str, proves: str, *, on_request: bool = False
) -> Callable[[Callable[[Subject], Finding]], Callable[[Subject], Finding]]:
    """Return a decorator that adds a check."""

    def add(run: Callable[[Subject], Finding]) -> Callable[[Subject], Finding]:
        CHECKS[name] = Check(name, proves, run, on_request)
        return run

    return add


def select(checks: str | Iterable[str] | None = None) -> list[Check]:
    """Return the checks that names or globs select; None for all that do not have to be asked for by name.

    Raises:
        UnknownName: a name or glob selects none.
    """
    if checks is None:
        return [check for check in CHECKS.values() if not check.on_request]
    wanted: set[str] = set()
    for query in [checks] if isinstance(checks, str) else checks:
        found = [
            name
            for name, check in CHECKS.items()
            if name == query or (fnmatch.fnmatchcase(name, query) and not check.on_request)
        ]
        if not found:
            raise UnknownName(f"No check matches {query!r}. Checks: {', '.join(CHECKS)}.{suggest(query, CHECKS)}")
        wanted.update(found)
    return [check for name, check in CHECKS.items() if name in wanted]
