"""What a scope does with the activations it reads: keep, note, count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from prisma_core.errors import HookError, InputError
from prisma_core.hooks.point import Stop

Index = int | slice | Sequence[int] | Tensor
Cut = tuple[int, "slice | list[int]"]


def cuts(axes: str, pos: Index | None, heads: Index | None) -> tuple[Cut, ...]:
    """Return which part to keep of which axis of an activation with these axes."""
    names = axes.split()
    found: list[Cut] = []
    for index, wanted in ((pos, ("pos", "query_pos")), (heads, ("head",))):
        axis = next((names.index(name) for name in wanted if name in names), None)
        if index is not None and axis is not None:
            found.append((axis, index if isinstance(index, slice) else indices(index)))
    return tuple(found)


def check_axes(axes: Sequence[str], pos: Index | None, heads: Index | None) -> None:
    """Refuse a choice of positions or heads if no activation asked for has any; those without are kept whole.

    Args:
        axes: those of each activation.

    Raises:
        InputError: with the axes there are.
    """
    for index, wanted, what in ((pos, ("pos", "query_pos"), "pos"), (heads, ("head",), "heads")):
        if index is not None and axes and not any(name in each.split() for each in axes for name in wanted):
            there = " and ".join(f"[{each}]" for each in list(dict.fromkeys(axes))[:3])
            raise InputError(
                f"{what}= chooses along the axis {' or '.join(map(repr, wanted))}, and nothing asked for has one: "
                f"it is {there}. Leave {what} out, or ask for activations that have it."
            )


def indices(index: int | Sequence[int] | Tensor) -> list[int]:
    """Return positions given as a number, numbers, or a mask, as a list.

    Raises:
        HookError: they are not whole numbers.
    """
    wanted = torch.as_tensor(index)
    if wanted.dtype == torch.bool:
        wanted = wanted.nonzero()
    if wanted.is_floating_point() and wanted.numel():
        raise HookError(f"Expected positions as whole numbers or a mask, got {wanted.dtype}.")
    return cast("list[int]", wanted.flatten().tolist())


def positions_of(index: Index | None, n: int) -> list[int]:
    """Return which of ``n`` places an index means, all for None.

    Raises:
        InputError: there is no such place.
    """
    every = range(n)
    if index is None:
        return list(every)
    if isinstance(index, slice):
        return list(every[index])
    wanted = indices(index)
    if any(not -n <= each < n for each in wanted):
        raise InputError(f"No position {wanted}: there are {n}.")
    return [every[each] for each in wanted]


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


class Keep:
    """Puts one activation into a store.

    Args:
        cuts: what to keep of which axis.
    """

    def __init__(
        self,
        store: dict[str, Tensor],
        name: str,
        cuts: tuple[Cut, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
    ):
        self.store = store
        self.name = name
        self.cuts = cuts
        self.device = device
        self.dtype = dtype
        self.detach = detach

    def __call__(self, x: Tensor) -> None:
        if self.name in self.store:
            raise HookError(f"{self.name} fired twice: a cache holds one pass. Open a new scope for the next one.")
        if self.detach and x.requires_grad:
            x = x.detach()
        whole = x.numel()
        for axis, index in self.cuts:
            x = self._cut(x, axis, index)
        if x.numel() < whole:
            x = x.clone()  # a view would keep the whole activation alive
        if self.device is not None or self.dtype is not None:
            x = x.to(device=self.device, dtype=self.dtype)
        self.store[self.name] = x

    def _cut(self, x: Tensor, axis: int, index: slice | list[int]) -> Tensor:
        n = x.shape[axis]
        if isinstance(index, slice):
            return x[(slice(None),) * axis + (index,)]
        for each in index:
            if not -n <= each < n:
                raise HookError(f"No index {each} on axis {axis} of {self.name}, whose shape is {list(x.shape)}.")
        chosen = torch.tensor([each % n for each in index], device=x.device)
        return x.index_select(axis, chosen)


class Countdown:
    """Stops the pass at the last of a number of captures."""

    def __init__(self, left: int):
        self.left = left

    def __call__(self, x: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def refuse_unreached(names: Sequence[str], kwargs: Mapping[str, object]) -> None:
    """Refuse hook points that a pass did not go by, if there are any.

    Raises:
        HookError: with their names, and the arguments that may have kept the pass away from them.
    """
    if names:
        limits = ", ".join(f"{key}={value}" for key, value in kwargs.items() if value is not None)
        raise HookError(
            f"{names[0]} was not reached in this pass{f' ({limits})' if limits else ''}"
            f"{f', nor were {len(names) - 1} others' if len(names) > 1 else ''}. "
            "Ask only for hook points the pass goes through."
        )
