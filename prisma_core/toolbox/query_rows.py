"""Some queries' rows of scores and patterns, where the open scopes keep no more of them."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from prisma_core.hooks.capture import Countdown, Keep
from prisma_core.hooks.point import OPEN_SCOPES, Capture, HookPoint, keep_scopes

AXIS = "query_pos"


class Rows:
    """The rows that every open scope keeps of scores and patterns.

    Args:
        capture: one that keeps them.
        axis: of the queries, in the activation that it keeps.
    """

    def __init__(self, capture: Keep, axis: int):
        self.capture, self.axis = capture, axis

    @classmethod
    def asked(cls, *points: HookPoint) -> Rows | None:
        """Return the rows that the open scopes keep at these hook points; None where a scope wants more than these."""
        if any(point.edited for point in points):
            return None
        kept = [(each, axis_of(point)) for point in points for each in captures(point)]
        return cls.common(
            cls(each, axis) if isinstance(each, Keep) and axis in dict(each.slices) else None
            for each, axis in kept
            if not isinstance(each, Countdown)
        )

    @classmethod
    def common(cls, several: Iterable[Rows | None]) -> Rows | None:
        """Return rows that are the same in all of these; None where they are not, or there are none."""
        rows = list(several)
        indices = [None if each is None else dict(each.capture.slices)[each.axis] for each in rows]
        return rows[0] if rows and all(index == indices[0] for index in indices) else None

    def of(self, x: Float[Tensor, "*batch query_pos any"]) -> Float[Tensor, "*batch row any"]:
        """Return the rows of a tensor."""
        return self.capture.along(x, self.axis, x.ndim - 2)

    def store(self, point: HookPoint, x: Float[Tensor, "*batch row key_pos"]) -> None:
        """Store rows for each scope that asks for them at a hook point."""
        keep_scopes(OPEN_SCOPES.get())
        for capture in captures(point):
            capture(x, cut=axis_of(point)) if isinstance(capture, Keep) else capture(x)


def axis_of(point: HookPoint) -> int:
    """Return the axis of the queries of an activation; -1 where they are no positions."""
    names = point.axes.split()
    return names.index(AXIS) if AXIS in names else -1


def captures(point: HookPoint) -> list[Capture]:
    """Return what the open scopes read a hook point with."""
    return [capture for scope in OPEN_SCOPES.get() for capture in scope.captures.get(point.key, ())]
