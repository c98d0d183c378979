"""Bounds of errors, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, cast

from prisma_core.plugin import Facts, NormSpec, RopeSpec

# float64 keeps 16 digits and two blocks lose about two of them. A wrong eps of 1e-6 moves logits by 1e-7 or more, and
# tanh instead of erf in the activation by 1e-4, so everything that is a mistake stays far above this.
FLOAT64: Final = 1e-10

# Gradients go through twice as many operations as the logits do, and are compared entry by entry with the largest entry
# of their tensor, not with a typical one.
GRADIENT: Final = 1e-9

# Where bits may differ (another order of summation, another kernel), each side errs against float64 on the very numbers
# that the dtype holds. We may err as upstream does, by the root of the mean square over eight inputs, on any device and
# in any dtype. The two are drawn alike, and among all architectures differ by less than a half. Of a few numbers that
# may be chance (a model of five classes: 0.84 to 1.07 over eight inputs, 0.94 to 1.00 over 64), so what errs by more is
# measured over more inputs before it is called a mistake.
OWN_ERROR_FACTOR: Final = 1.5
OWN_ERROR_INPUTS: Final = (8, 64)

# While scores and patterns are shown, they are rounded to the dtype, which fused kernels do not do.
SHOWN_ERROR_FACTOR: Final = 2.5


# Errors are counted in the standard deviation of what should come out. But rounding is a share of a number's size, not
# of how much it varies: scales that hardly vary about a mean (those behind a norm with weights of one do not at all)
# would have their rounding counted as an error. So the unit is at least this share of the size, the root of the mean
# square. What is a mistake moves such numbers by a share of their size too, and stays as far above the bounds.
SHARE_OF_SIZE: Final = 0.1


# Two routes to one number through a norm or a rotation that rounds to float32, whatever comes in, differ by that
# rounding (1e-7), and scales vary little about a mean, so that in units of their standard deviation it counts ten times
# and more.
_IN_FLOAT32: Final = 1e-5


def routes(spec: Facts) -> float:
    """Bound for two ways of computing the same number in float64."""
    return _IN_FLOAT32 if any(part.in_float32 for part in _rounding(spec)) else FLOAT64


def _rounding(facts: object) -> Iterator[NormSpec | RopeSpec]:
    if isinstance(facts, NormSpec | RopeSpec):
        yield facts
    elif isinstance(facts, Facts):
        for _, value in facts:
            yield from _rounding(value)
    elif isinstance(facts, tuple):
        for value in cast("tuple[object, ...]", facts):
            yield from _rounding(value)
