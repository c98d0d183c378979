"""Gradients of a number by every activation of a pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from prisma_core.errors import HookError
from prisma_core.hooks.point import HookContext, HookPoint, Placed, Scope, activate


def leaves(points: Mapping[str, HookPoint], names: Iterable[str]) -> AbstractContextManager[None]:
    """Make activations part of a graph even where neither input nor weights need gradients."""
    edits = {points[name]: (Placed(_as_leaf, HookContext(name, points[name].axes)),) for name in names}
    return activate(Scope(edits=edits))


def _as_leaf(x: Tensor, at: HookContext) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


def gradients(value: Tensor, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of one number by each activation, by name; zeros where it does not depend on it.

    Raises:
        HookError: it is not one number.
    """
    if value.numel() != 1:
        raise HookError(f"The loss must be one number; got shape {list(value.shape)}. Pick a logit or take a mean.")
    found = torch.autograd.grad(
        value, list(activations.values()), allow_unused=True, retain_graph=True, materialize_grads=True
    )
    return dict(zip(activations, found, strict=True))
