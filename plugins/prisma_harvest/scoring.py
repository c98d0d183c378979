"""Scores of units at tokens, and the largest of them whatever the algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from prisma_core import InputError
from prisma_harvest.manifest import Point

_LOW = 2**32 - 1


def largest(values: Tensor, k: int) -> Tensor:
    """Return the places of the k largest of each row, largest first, the first of equal ones: ``[row k]``.

    One integer orders by value and then by place, so no two are equal and any algorithm finds the same.

    >>> largest(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3)
    tensor([[1, 2, 3]])
    """
    bits = (values.contiguous() + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = ordered * 2**32 + (_LOW - torch.arange(values.shape[1]))
    return _LOW - (keys.topk(min(k, values.shape[1]), 1).values & _LOW)


def scored(x: Tensor, point: Point, over: str, directions: Tensor | None) -> Tensor:
    """Return the scores of activations as float32: ``[example token unit]``."""
    x = x.detach().cpu().float()
    x = x if has_tokens(point) else x[:, None]
    if directions is not None:
        return x.flatten(2) @ directions.detach().cpu().float().T
    return x.norm(dim=-1) if over == "head" else x.flatten(2)


def has_tokens(point: Point) -> bool:
    return point.axes.split()[0] in ("pos", "patch")


def count_units(point: Point, over: str, directions: Tensor | None) -> int:
    """Return how many units there are.

    Raises:
        InputError: the hook point or the directions do not fit.
    """
    axes = point.axes.split()
    if not has_tokens(point) and len(axes) > 1:
        raise InputError(f"{point.name} is [{point.axes}], without tokens: expected a place such as mlp.hook_post.")
    width = torch.Size(point.shape[1:] if has_tokens(point) else point.shape).numel()
    if directions is not None:
        if directions.ndim != 2 or directions.shape[1] != width:
            raise InputError(
                f"{point.name} has {width} numbers a token: expected directions [direction {width}], got "
                f"{list(directions.shape)}."
            )
        return len(directions)
    if over not in ("feature", "head"):
        raise InputError(f"Expected over='feature' or 'head', got {over!r}.")
    if over == "head" and axes[1:2] != ["head"]:
        raise InputError(f"{point.name} is [{point.axes}], without heads: expected z or result.")
    return point.shape[1] if over == "head" else width
