"""A check of the kit, and its finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prisma_conformance.report.results import Precision

if TYPE_CHECKING:
    from prisma_conformance.subject import Subject


@dataclass(frozen=True)
class Finding:
    """Result of a check on one subject.

    Attributes:
        error, bound: the largest error, and the largest allowed one.
        problems: anything else that is wrong; each one fails the check.
        detail: scope of the check, such as how many tensors were compared.
        precisions: errors in dtypes other than float64.
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
    """One property that the kit proves.

    A function that cannot apply to a subject raises ``prisma_core.NotApplicable`` with the reason: a skip.

    Attributes:
        name: dotted; selects the check.
        proves: one line for reports and docs.
        canonical: runs it on a model in canonical form.
        hooked: runs it on a hooked upstream, a model without canonical form.
        on_request: too slow to run unless it is selected by its name.
    """

    name: str
    proves: str
    canonical: Callable[[Subject], Finding]
    hooked: Callable[[Subject], Finding]
    on_request: bool = False

    def run(self, subject: Subject) -> Finding:
        """Run the check in the form that fits the subject's model.

        Raises:
            NotApplicable: it cannot apply to this model.
        """
        return (self.canonical if subject.form == "canonical" else self.hooked)(subject)


__all__ = ["Check", "Finding"]
