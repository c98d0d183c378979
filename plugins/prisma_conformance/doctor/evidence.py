"""What the first activation that differs says by itself: a factor, a summand, another order, an ignored tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, permutations

import torch
from torch import Tensor

from prisma_conformance import tolerances
from prisma_conformance.doctor.numbers import Number


def evidence(
    ours: Tensor, theirs: Tensor, axes: Sequence[str], spare: Mapping[str, Tensor], numbers: Sequence[Number]
) -> Iterator[str]:
    """Yield what would turn our activation into upstream's, one sentence each.

    Args:
        ours, theirs: an activation, and upstream's.
        axes: the names of their axes.
        spare: upstream's tensors that the weight table does not take.
        numbers: of upstream's modules.
    """
    if ours.shape != theirs.shape:
        yield f"Upstream's has the shape {list(theirs.shape)}, ours {list(ours.shape)}: {' '.join(axes)}."
    if ours.shape != theirs.shape or ours.ndim < 2:
        return
    if _close(ours, theirs):
        yield "At the place that its row reads it agrees: what call() or output() of the adapter returns is another."
        return
    if _close(theirs, torch.zeros_like(theirs)) or not torch.isfinite(ours).all():
        return
    if _close(ours.softmax(-1), theirs):
        yield "Upstream's is the softmax of ours."
        return
    for axis in range(1, ours.ndim):
        apart = ((ours - theirs).movedim(axis, 0).flatten(1).abs().amax(1) > 1e3 * tolerances.FLOAT64).nonzero()
        if 0 < len(apart) <= ours.shape[axis] // 2:
            yield f"They differ at {axes[axis]} {apart.flatten().tolist()[:12]} alone, of {ours.shape[axis]}."
            yield from reordered(ours, theirs, axes)
            return
    operations: tuple[tuple[str, Tensor, Callable[[Tensor, Tensor], Tensor]], ...] = (
        ("times", theirs / ours, torch.mul),
        ("plus", theirs - ours, torch.add),
    )
    for what, change, operate in operations:
        factor = change.flatten()[change.flatten().abs().argsort()[change.numel() // 2]]
        if _close(operate(ours, factor), theirs):
            value = float(factor)
            yield f"Upstream's is ours {what} {value:.6g}{_named(value, numbers)}."
            return
        for kept in _kept(axes):
            constant = _median(change, kept)
            if _close(operate(ours, constant), theirs):
                of = " and ".join(axes[axis] for axis in kept)
                missing = "scale" if what == "times" else "summand"
                source = _equal(constant, spare) or ", or is another"
                yield f"Upstream's is ours {what} a number for each {of}: a {missing} is missing{source}."
                return
    yield from reordered(ours, theirs, axes)


def _kept(axes: Sequence[str]) -> list[tuple[int, ...]]:
    last, second = len(axes) - 1, len(axes) - 2
    every = tuple(range(1, len(axes)))  # the same for all inputs
    return list(dict.fromkeys([(last,), *([(second,), (second, last), every] if second > 0 else [])]))


def _median(x: Tensor, kept: tuple[int, ...]) -> Tensor:
    for axis in range(x.ndim):
        if axis not in kept:
            x = x.median(axis, keepdim=True).values
    return x


def _close(one: Tensor, other: Tensor) -> bool:
    unit = max(float(other.abs().max()), 1e-30)
    return float((one - other).abs().max()) <= 1e3 * tolerances.FLOAT64 * unit


def _named(value: float, numbers: Sequence[Number]) -> str:
    for number in numbers:
        if number.name and any(abs(one - value) <= 1e-9 * abs(value) for one in number.values.values()):
            return str(number)
    return ""


def _equal(constant: Tensor, spare: Mapping[str, Tensor]) -> str:
    values = constant.flatten()
    for name, tensor in spare.items():
        if tensor.numel() == values.numel() and _close(tensor.flatten().to(values), values):
            return f"; it is upstream's {name}, which no row takes"
    return ""


def reordered(ours: Tensor, theirs: Tensor, axes: Sequence[str], says: str = "Upstream's is ours") -> Iterator[str]:
    """Find an axis along which the two hold the same numbers in another order, or in one of its own for each place.

    Args:
        ours, theirs, axes: as ``evidence`` takes them.
        says: how the sentence begins.
    """
    if not _close(ours.flatten().sort().values, theirs.flatten().sort().values):
        return
    several = range(1, ours.ndim)
    for axis in several:
        if order := order_of(ours, theirs, axis):
            yield f"{says} in another order of {axes[axis]}: {_short(order)}."
            return
    for by, axis in permutations(several, 2):
        pairs = zip(ours.unbind(by), theirs.unbind(by), strict=True)
        orders = [order_of(one, other, axis - (by < axis)) for one, other in pairs]
        if all(orders):
            where = (f"{at}: {_short(order)}" for at, order in enumerate(orders) if order != sorted(order))
            yield f"{says} in another order of {axes[axis]} at {axes[by]} {'; '.join(islice(where, 6))}."
            return
    if ours.ndim > 2:
        yield f"{says} with its numbers in another order."


def order_of(ours: Tensor, theirs: Tensor, axis: int = 0) -> list[int]:
    """The order in which ours are theirs along an axis; none if they differ in more."""
    one, other = (x.movedim(axis, 0).flatten(1) for x in (ours, theirs))
    order = [int((one - row).abs().amax(1).argmin()) for row in other]
    return order if sorted(order) == list(range(len(one))) and _close(one[order], other) else []


def _short(order: Sequence[int]) -> str:
    return f"{list(order[:12])}{' ...' if len(order) > 12 else ''}"


__all__ = ["evidence", "order_of", "reordered"]
