"""Errors between two tensors, in units of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from prisma_conformance import tolerances


def unit_of(reference: Tensor) -> float:
    """Unit of errors: the standard deviation, or ``tolerances.SHARE_OF_SIZE`` of the root mean square if it is more."""
    if reference.numel() == 1:
        return float(reference.abs())
    size = float(reference.square().mean().sqrt())
    return max(float(reference.std()), tolerances.SHARE_OF_SIZE * size)


def worst(ours: Tensor, theirs: Tensor, unit: float | None = None) -> float:
    """Largest difference, in units of the reference; infinite where shapes differ or a number is NaN.

    Scores that a mask hides must be minus infinity in ``ours`` where they are, or are the least number, in ``theirs``.

    Args:
        ours, theirs: tensors of one shape; ``theirs`` is the reference.
        unit: of the errors; default ``unit_of(theirs)``.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    if not ours.numel():
        return 0.0
    ours, theirs = ours.detach().double(), theirs.detach().double()
    hidden = theirs < torch.finfo(torch.float64).min / 2
    if hidden.any():
        if not torch.equal(hidden, torch.isneginf(ours)):
            return float("inf")
        ours, theirs = ours[~hidden], theirs[~hidden]
    if unit is None:
        unit = unit_of(theirs)
    return _ratio(float((ours - theirs).abs().max()), unit)


def typical(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference, in the unit of ``worst``."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return _ratio(float((ours - theirs).square().mean().sqrt()), unit_of(theirs))


def _ratio(difference: float, unit: float) -> float:
    # A NaN on either side is the worst error there is; comparisons with it would be false.
    return difference / max(unit, 1e-30) if difference == difference else float("inf")


__all__ = ["typical", "unit_of", "worst"]
