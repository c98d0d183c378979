"""Some queries' rows of scores and patterns, where the open scopes keep no more of them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from prisma_core.hooks.capture import Countdown, Keep
from prisma_core.hooks.point import OPEN_SCOPES, Capture, HookPoint

AXIS = 2  # of the queries


class Rows:
    """The rows that every open scope keeps of scores and patterns."""

    def __init__(self, keep: Keep):
        self.keep = keep

    @classmethod
    def asked(cls, *points: HookPoint) -> Rows | None:
        """Return the rows that the open scopes keep at these hook points; None where a scope wants more than these."""
        open_captures = [each for point in points for each in captures(point) if not isinstance(each, Countdown)]
        keeps = [each for each in open_captures if isinstance(each, Keep)]
        kinds = [dict(each.slices).get(AXIS) for each in keeps]
        if len(keeps) < len(open_captures) or any(point.edited for point in points):
            return None
        return cls(keeps[0]) if kinds[0] is not None and all(kind == kinds[0] for kind in kinds) else None

    def of(self, x: Float[Tensor, "batch head query_pos any"]) -> Float[Tensor, "batch head row any"]:
        """Return the rows of a tensor."""
        return self.keep.along(x, AXIS)

    def store(self, point: HookPoint, x: Float[Tensor, "batch head row key_pos"]) -> None:
        """Store rows for each scope that asks for them at a hook point."""
        for capture in captures(point):
            capture(x, cut=AXIS) if isinstance(capture, Keep) else capture(x)


def captures(point: HookPoint) -> list[Capture]:
    """Return what the open scopes read a hook point with."""
    return [capture for scope in OPEN_SCOPES.get() for capture in scope.captures.get(point, ())]
