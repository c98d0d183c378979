"""Captures: store an activation, cut and cast; stop a pass; and the gradients of a loss by stored activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from prisma_core.errors import HookError, InputError
from prisma_core.hooks.point import OPEN_SCOPES, Capture, HookPoint, Stop
from prisma_core.hooks.recompute import has_no_graph, is_second
from prisma_core.spec.layout import Index, indices

IndexSlice = tuple[int, "slice | list[int]"]  # an axis, and what to keep of it

_POS, _HEADS = ("pos", "query_pos"), ("head",)


def index_slices(axes: str, pos: Index | None, heads: Index | None) -> tuple[IndexSlice, ...]:
    """Return what to keep of which axis of an activation with these axes.

    >>> index_slices("batch head query_pos key_pos", slice(0, 1), [2, 3])
    ((2, slice(0, 1, None)), (1, [2, 3]))
    """
    names = axes.split()
    slices: list[IndexSlice] = []
    for index, kinds in ((pos, _POS), (heads, _HEADS)):
        axis = next((names.index(kind) for kind in kinds if kind in names), None)
        if isinstance(index, slice) and (index.step or 1) < 0:
            raise InputError(f"Expected a slice that goes forward, got {index!r}.")
        if index is not None and axis is not None:
            slices.append((axis, index if isinstance(index, slice) else indices(index)))
    return tuple(slices)


def check_axes(axes: Sequence[str], pos: Index | None, heads: Index | None) -> None:
    """Refuse a choice of positions or heads if no activation has any; those without are kept whole.

    Args:
        axes: those of each activation.

    Raises:
        InputError: with the axes there are.
    """
    for index, kinds, keyword in ((pos, _POS, "pos"), (heads, _HEADS, "heads")):
        if index is not None and axes and not any(kind in each.split() for each in axes for kind in kinds):
            there = " and ".join(f"[{each}]" for each in list(dict.fromkeys(axes))[:3])
            raise InputError(
                f"{keyword}= chooses along the axis {' or '.join(map(repr, kinds))}, and nothing asked for has one: "
                f"it is {there}. Leave {keyword} out, or ask for activations that have it."
            )


@dataclass(eq=False)
class Keep:
    """Stores one activation.

    Attributes:
        store: where, by name.
        slices: what to keep of which axis.
    """

    store: dict[str, Tensor]
    name: str
    slices: tuple[IndexSlice, ...] = ()
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    detach: bool = True

    @property
    def reached(self) -> bool:
        return self.name in self.store

    def __call__(self, x: Tensor, *, cut: int | None = None) -> None:
        """Store an activation, of which ``cut`` is an axis that holds no more than what is kept of it."""
        if self.name in self.store and is_second():
            return
        if self.name in self.store:
            raise HookError(f"{self.name} fired twice: a cache holds one pass. Open a new scope for the next one.")
        if not self.detach and has_no_graph():
            raise HookError(f"{self.name} has no graph here; checkpoint with use_reentrant=False.")
        self.store[self.name] = self.cut(x, cut)

    def cut(self, x: Tensor, done: int | None = None) -> Tensor:
        """Return what is kept of an activation, one axis of which may have been cut already."""
        if self.detach and x.requires_grad:
            x = x.detach()
        whole = x.numel()
        for axis, _ in self.slices:
            x = x if axis == done else self.along(x, axis)
        if x.numel() < whole:
            x = x.clone()  # a view would keep the whole activation alive
        if self.device is not None or self.dtype is not None:
            x = x.to(device=self.device, dtype=self.dtype)
        return x

    def along(self, x: Tensor, axis: int) -> Tensor:
        """Return what is kept of a tensor along one axis of the activation."""
        index = dict(self.slices)[axis]
        n = x.shape[axis]
        if isinstance(index, slice):
            if not len(range(*index.indices(n))):
                raise InputError(f"{index!r} selects nothing on axis {axis} of {self.name}, which has {n} there.")
            return x[(slice(None),) * axis + (index,)]
        for each in index:
            if not -n <= each < n:
                raise InputError(f"No index {each} on axis {axis} of {self.name}, which has {n} there.")
        return x.index_select(axis, torch.tensor([each % n for each in index], dtype=torch.long, device=x.device))

    def __repr__(self) -> str:
        return f"Keep({self.name!r})"


@dataclass(eq=False)
class Countdown:
    """Stops the pass at the last of ``n`` captures."""

    n: int

    def __call__(self, x: Tensor) -> None:
        self.n -= 1
        if self.n == 0:
            raise Stop


class Rows:
    """Some queries' rows of scores and patterns, which are all that the open scopes keep of them.

    Attributes:
        axis: that of the queries.
    """

    axis = 2

    def __init__(self, keep: Keep):
        self.keep = keep

    @classmethod
    def asked(cls, *points: HookPoint) -> Rows | None:
        """Return the rows that the open scopes keep at these hook points; None where a scope wants more than these."""
        captures = [each for point in points for each in _captures(point) if not isinstance(each, Countdown)]
        keeps = [each for each in captures if isinstance(each, Keep)]
        kinds = [dict(each.slices).get(cls.axis) for each in keeps]
        if len(keeps) < len(captures) or any(point.edited for point in points):
            return None
        return cls(keeps[0]) if kinds[0] is not None and all(kind == kinds[0] for kind in kinds) else None

    def of(self, x: Tensor) -> Tensor:
        """Return the rows of a tensor ``[batch head query_pos ...]``."""
        return self.keep.along(x, self.axis)

    def store(self, point: HookPoint, x: Tensor) -> None:
        """Store rows ``[batch head query_pos key_pos]`` for each scope that asks for them at a hook point."""
        for capture in _captures(point):
            capture(x, cut=self.axis) if isinstance(capture, Keep) else capture(x)


def _captures(point: HookPoint) -> list[Capture]:
    return [capture for scope in OPEN_SCOPES.get() for capture in scope.captures.get(point, ())]


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
    tensors = list(activations.values())
    grads = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True, materialize_grads=True)
    return dict(zip(activations, grads, strict=True))
