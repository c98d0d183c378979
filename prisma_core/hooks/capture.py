"""Captures: store an activation, cut and cast; stop a pass; and the gradients of a loss by stored activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from prisma_core.errors import HookError, InputError
from prisma_core.hooks.point import Stop
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
            raise HookError(f"Expected a slice that goes forward, got {index!r}.")
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


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype of a name, such as ``float16``; a dtype comes back as it is.

    Raises:
        InputError: torch has none of this name.
    """
    named: object = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if (named is not None and not isinstance(named, torch.dtype)) or (named is None and dtype is not None):
        raise InputError(f"{dtype!r} is not a dtype: expected one of torch's, such as torch.float16.")
    return named


def check_device(device: torch.device | str | None) -> None:
    """Refuse a device that is not there, before a pass is made for nothing.

    Raises:
        InputError: torch cannot put anything on it.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch's ways to say so
        there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        raise InputError(f"Expected a device of torch's, got {device!r}; there is {' and '.join(there)}.") from error


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

    def __call__(self, x: Tensor) -> None:
        if self.name in self.store:
            raise HookError(
                f"{self.name} fired twice, and a cache holds one pass. Open a new scope for the next pass; a part that "
                "upstream's code runs several times in one pass cannot be cached."
            )
        self.store[self.name] = self.cut(x)

    def cut(self, x: Tensor) -> Tensor:
        """Return what is kept of an activation."""
        if self.detach and x.requires_grad:
            x = x.detach()
        whole = x.numel()
        for axis, index in self.slices:
            x = x[(slice(None),) * axis + (index,)] if isinstance(index, slice) else self._selected(x, axis, index)
        if x.numel() < whole:
            x = x.clone()  # a view would keep the whole activation alive
        if self.device is not None or self.dtype is not None:
            x = x.to(device=self.device, dtype=self.dtype)
        return x

    def _selected(self, x: Tensor, axis: int, index: list[int]) -> Tensor:
        n = x.shape[axis]
        for each in index:
            if not -n <= each < n:
                raise HookError(f"No index {each} on axis {axis} of {self.name}, whose shape is {list(x.shape)}.")
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


def gradients(loss: Callable[[Any], Tensor], output: object, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of a loss of the output by each activation, by name; zeros where it does not depend on it.

    Raises:
        HookError: the loss is no function to one number, or its number carries no graph.
    """
    if not callable(cast(object, loss)):
        raise HookError(f"The loss is {type(loss).__name__}; expected a function from the output to one number.")
    value = cast(object, loss(output))
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise HookError(f"The loss must be one number; got {came}. Pick a logit or take a mean.")
    if not value.requires_grad:
        raise HookError("The loss carries no graph: compute it without detach(), outside torch.inference_mode().")
    tensors = list(activations.values())
    grads = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True, materialize_grads=True)
    return dict(zip(activations, grads, strict=True))
