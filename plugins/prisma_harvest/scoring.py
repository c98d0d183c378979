"""Scores of units at tokens, and the largest of them whatever the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from prisma_core import InputError, tensors_of
from prisma_core.plugin import check_call, digest, shown
from prisma_harvest.manifest import Point, tensor_bytes

Encode: TypeAlias = Callable[[Tensor], Tensor]

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


@dataclass(frozen=True)
class Units:
    """How activations become scores.

    Attributes:
        over: ``"feature"`` or ``"head"``: the numbers of an activation, or the norms of its heads.
        directions: ``[direction d]``, to score instead.
        encode: a function of rows ``[row d]`` to scores ``[row unit]``, to take instead.
    """

    over: str = "feature"
    directions: Tensor | None = None
    encode: Encode | None = None

    @property
    def axis(self) -> str:
        """The name of the units' axis."""
        return "direction" if self.directions is not None else "feature" if self.encode is not None else self.over

    def scores(self, x: Tensor, point: Point) -> Tensor:
        """Return the scores of activations as float32: ``[example token unit]``."""
        x = point.by_token(x.detach().cpu().float())
        if self.encode is not None:
            rows = x.flatten(2)
            with torch.no_grad():
                return self.encode(rows.flatten(0, 1)).cpu().float().unflatten(0, rows.shape[:2])
        if self.directions is not None:
            return x.flatten(2) @ self.directions.detach().cpu().float().T
        return x.norm(dim=-1) if self.over == "head" else x.flatten(2)

    def count(self, point: Point) -> int:
        """Return how many units there are.

        Raises:
            InputError: the hook point or the directions do not fit.
        """
        axes = point.axes.split()[point.token_axes :]
        if not point.has_tokens and len(axes) > 1:
            raise InputError(f"{point.name} is [{point.axes}], without tokens: expected a place such as mlp.hook_post.")
        width = torch.Size(point.inner).numel()
        if self.over not in ("feature", "head"):
            raise InputError(f"Expected over='feature' or 'head', got {self.over!r}.")
        if (self.directions is not None) + (self.encode is not None) + (self.over == "head") > 1:
            raise InputError("Expected one of directions=, encode= and over='head'.")
        if self.encode is not None:
            return self._encoded(point.name, width)
        if self.directions is not None:
            if self.directions.ndim != 2 or self.directions.shape[1] != width:
                raise InputError(
                    f"{point.name} has {width} numbers a token: expected directions [direction {width}], got "
                    f"{list(self.directions.shape)}."
                )
            if self.directions.is_complex() or not bool(torch.isfinite(self.directions).all()):
                raise InputError("Expected directions of finite real numbers, got NaN, infinite or complex ones.")
            return len(self.directions)
        if self.over == "head" and axes[:1] != ["head"]:
            raise InputError(f"{point.name} is [{point.axes}], without heads: expected z or result.")
        return point.inner[0] if self.over == "head" else width

    def _encoded(self, name: str, width: int) -> int:
        assert self.encode is not None
        check_call(self.encode, 1, "encode=", "encode(rows) -> scores")
        with torch.no_grad():
            scores = self.encode(torch.zeros(2, width))
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != 2 or scores.is_complex():
            raise InputError(
                f"Expected encode to take rows [2 {width}] of {name} to real scores [2 unit], got {shown(scores)}."
            )
        return scores.shape[1]

    def mark(self) -> bytes:
        """Return what tells these units from others.

        Raises:
            InputError: ``encode`` is a plain function, which cannot be told from another.
        """
        if self.encode is not None:
            module = self.encode if isinstance(self.encode, nn.Module) else getattr(self.encode, "__self__", None)
            if not isinstance(module, nn.Module):
                raise InputError(
                    "resume= needs an encode that can be told from another one: a module, or a method of one such as "
                    "coder.encode."
                )
            facts = getattr(module, "facts", None)
            said = facts.model_dump_json() if isinstance(facts, BaseModel) else ""
            return f"{digest(tensors_of(module))} {module!r} {said} {getattr(self.encode, '__name__', '')}".encode()
        return self.over.encode() if self.directions is None else bytes(tensor_bytes(self.directions))
