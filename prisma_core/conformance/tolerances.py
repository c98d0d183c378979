"""How far numbers may differ, each with its reason."""

from __future__ import annotations

from typing import Final

import torch

# float64 keeps 16 digits and two blocks lose about two of them. A wrong eps of 1e-6 moves logits by 1e-7 or more, and
# tanh instead of erf in the activation by 1e-4, so everything that is a mistake stays far above this.
FLOAT64: Final = 1e-10

# Gradients go through twice as many operations as the logits do, and are compared entry by entry with the largest entry
# of their tensor, not with a typical one.
GRADIENT: Final = 1e-9

# Where bits may differ (another order of summation), each side errs against float64. We may err as upstream does: twice,
# for the largest of a few thousand errors that are drawn alike differs by about that much from draw to draw.
OWN_ERROR_FACTOR: Final = 2.0


def rounding(dtype: torch.dtype) -> float:
    """Return the error that a handful of rounded operations leave, for models too small to show upstream's own."""
    return 8 * torch.finfo(dtype).eps
