"""Captures: store an activation, cut and cast; stop a pass; and the gradients of a loss by stored activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from prisma_core.errors import HookError, InputError
from prisma_core.errors.arguments import unwrapped
from prisma_core.hooks.point import Stop
from prisma_core.hooks.recompute import has_no_graph, is_second
from prisma_core.spec.layout import IndexSlice, check_places


@dataclass(eq=False)
class Keep:
    """Stores one activation.

    Attributes:
        store: where, by name.
        slices: what to keep of which axis.
        copy: whether other code may edit the activation in place, so that the store has a tensor of its own.
    """

    store: MutableMapping[str, Tensor]
    name: str
    slices: tuple[IndexSlice, ...] = ()
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    detach: bool = True
    copy: bool = False

    @property
    def reached(self) -> bool:
        return self.name in self.store

    def __call__(self, x: Tensor, *, cut: int | None = None) -> None:
        """Store an activation, of which ``cut`` is an axis that holds no more than what is kept of it."""
        if self.name in self.store:
            if is_second():
                return
            raise HookError(
                f"{self.name} fired twice: a cache holds one pass. Open a new scope for the next one. What runs "
                "several times in one pass, by upstream's code or compiled in a checkpoint, cannot be cached."
            )
        if not self.detach and has_no_graph():
            raise HookError(f"{self.name} has no graph here; checkpoint with use_reentrant=False.")
        self.store[self.name] = self.cut(x, cut)

    def cut(self, x: Tensor, done: int | None = None) -> Tensor:
        """Return what is kept of an activation, one axis of which may have been cut already."""
        x = x.detach() if self.detach and unwrapped(x).requires_grad else x
        whole = x.numel()
        for axis, _ in self.slices:
            x = x if axis == done else self.along(x, axis, axis)
        if x.numel() < whole:
            x = x.clone()  # a view would keep the whole activation alive, and change with it
        if self.device is not None or self.dtype is not None:
            x = x.to(device=self.device, dtype=self.dtype)
        return x

    def along(self, x: Tensor, axis: int, at: int) -> Tensor:
        """Return what is kept along one axis of the activation, of a tensor that has it at ``at``."""
        index, n = dict(self.slices)[axis], x.shape[at]
        if isinstance(index, slice):
            if not len(range(*index.indices(n))):
                raise InputError(f"{index!r} selects nothing on axis {axis} of {self.name}, which has {n} there.")
            return x[(slice(None),) * at + (index,)]
        check_places(index, n, f"axis {axis} of {self.name}")
        return x.index_select(at, torch.tensor([each % n for each in index], dtype=torch.long, device=x.device))

    def __repr__(self) -> str:
        return f"Keep({self.name!r})"


@dataclass(eq=False)
class Countdown:
    """Stops the pass of a model at the last of ``n`` captures."""

    n: int
    model: object

    def __call__(self, x: Tensor) -> None:
        self.n -= 1
        if self.n == 0:
            raise Stop(self.model)


def gradients(loss: Callable[[Any], Tensor], output: object, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of a loss of the output by each activation, by name; zeros where it does not depend on it.

    Raises:
        HookError: the loss gives anything but one number, or one that carries no graph.
    """
    value = cast(object, loss(output))
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise HookError(f"The loss must be one number; got {came}. Pick a logit or take a mean.")
    if not value.requires_grad:
        raise HookError("The loss carries no graph: compute it without detach(), outside torch.inference_mode().")
    grads = torch.autograd.grad(value, list(activations.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(activations, grads, strict=True))
