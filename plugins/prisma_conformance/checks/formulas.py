"""Formulas behind the ``=`` of a hook map's rows, evaluated on activations and upstream's own modules.

A formula is made of

- hook points, without ``hook_``: ``resid_pre``, ``mlp.pre``; looked for in the part of the row's hook point and then in
  the parts around it: ``ln1.normalized`` in a row of ``blocks.3.attn.hook_q`` is ``blocks.3.ln1.hook_normalized``. A
  name in full, ``blocks.3.ln1.hook_normalized``, is that hook point wherever it stands;
- ``input``, the model's input; and upstream's parameters, buffers and numbers by their paths: ``pos_embed``;
- upstream's modules, called: ``blocks.3.norm1(resid_pre)``, ``blocks.3.mlp.fc2(mlp.post)``;
- ``softmax(x)`` over the last axis, ``mean(x)`` and ``first(x)`` over the axes that the row's hook point lacks, and
  ``relu``, ``gelu``, ``silu``, ``sigmoid`` and ``tanh``;
- ``a + b``, ``a - b``, ``a * b``; ``q . k``, the products of queries and keys; ``pattern v``, a pattern times values.

A text with any other word is prose: it explains a hook point, and proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prisma_conformance.checks.grammar import Node, Prose, nodes, parse
from prisma_conformance.measure import worst
from prisma_core.plugin import Row

Acts = Mapping[str, Tensor]
Layout = Callable[[Tensor, Row], Tensor]  # of an activation with the axes of a row, as a module takes it

_ELEMENTWISE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_REDUCTIONS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda x, axis: x.mean(axis),
    "first": lambda x, axis: x.select(axis, 0),
}


@dataclass(frozen=True)
class Scope:
    """The names that formulas of one model may use.

    Attributes:
        rows: of the hook map, by hook point.
        sizes: of axes that rows unfold, ``batch`` among them.
        upstream: an untouched upstream.
        inputs: of the pass.
    """

    rows: Mapping[str, Row]
    sizes: Mapping[str, int]
    upstream: nn.Module
    inputs: tuple[Tensor, ...]

    def point(self, name: str, near: str) -> str | None:
        """Full name of a hook point: given in full, or without ``hook_``, and then the nearest to another one."""
        if name in self.rows:
            return name
        parts, (*path, last) = near.split(".")[:-1], name.split(".")
        for depth in range(len(parts), -1, -1):
            candidate = ".".join([*parts[:depth], *path, f"hook_{last}"])
            if candidate in self.rows:
                return candidate
        return None

    def module(self, path: str) -> nn.Module | None:
        """Upstream's module at a path."""
        try:
            return self.upstream.get_submodule(path)
        except AttributeError:
            return None

    def constant(self, path: str) -> Tensor | None:
        """Upstream's parameter, buffer or number at a path; or the input."""
        if path == "input":
            return self.inputs[0]
        where, _, name = path.rpartition(".")
        value: object = getattr(self.module(where), name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return torch.tensor(value, dtype=torch.float64)
        return value.detach() if isinstance(value, Tensor) else None


class Value(NamedTuple):
    """A tensor inside a formula.

    Attributes:
        row: of the hook point whose axes the tensor has; None where its axes are upstream's.
        module: whose output it is, if any's.
    """

    tensor: Tensor
    row: Row | None = None
    module: str | None = None


class Formula:
    """Equation of a hook point: ``point = text``.

    Args:
        point: the hook point.
        text: the right side.
        scope: the names it may use.

    Attributes:
        reads: the hook points on the right side.

    Raises:
        Prose: it is no formula.
    """

    def __init__(self, point: str, text: str, scope: Scope):
        self.point = point
        self.text = text
        self.scope = scope
        self.row = scope.rows[point]
        self._node = parse(text)
        self.reads: set[str] = set()
        for node in nodes(self._node):
            self._check(node)

    def _check(self, node: Node) -> None:
        if node.kind == "call":
            known = node.name in ("softmax", *_REDUCTIONS, *_ELEMENTWISE)
            if not known and self.scope.module(node.name) is None:
                raise Prose(f"{node.name!r} is no function and no module of upstream")
        elif node.kind == "name":
            if (point := self.scope.point(node.name, self.point)) is not None:
                self.reads.add(point)
            elif self.scope.constant(node.name) is None:
                raise Prose(f"{node.name!r} is no hook point near {self.point} and no tensor of upstream")

    def error(self, left: Acts, right: Acts) -> float:
        """Distance of the hook point in ``left`` from the formula's value on ``right``.

        Upstream's modules take an activation as upstream holds it at its own place, or as at the place of this hook
        point, or with heads side by side: a model may permute and fold axes in between. The smallest error counts.

        Raises:
            Exception: whatever evaluation raises in every layout.
        """
        errors: list[float] = []
        problems: list[Exception] = []
        for layout in (self._at_own_place, self._at_this_place, self._heads_side_by_side):
            try:
                errors.append(worst(left[self.point], self._value(right, layout, left[self.point])))
            except Exception as problem:  # noqa: BLE001  # upstream's modules refuse shapes in their own ways
                problems.append(problem)
        if not errors:
            raise problems[0]
        return min(errors)

    def __str__(self) -> str:
        return f"{self.point} = {self.text}"

    # ---------------------------------------------------------------- evaluation

    def _at_own_place(self, tensor: Tensor, row: Row) -> Tensor:
        return row.write(tensor, self.scope.sizes)

    def _at_this_place(self, tensor: Tensor, row: Row) -> Tensor:
        return self.row.write(tensor, self.scope.sizes)

    def _heads_side_by_side(self, tensor: Tensor, row: Row) -> Tensor:
        return tensor.flatten(-2)

    def _value(self, acts: Acts, layout: Layout, like: Tensor) -> Tensor:
        value = self._canonical(self._evaluate(self._node, acts, layout))
        if value.numel() == like.numel():  # some keep rows and columns apart, some do not
            return value.reshape(like.shape)
        constant = value.ndim == like.ndim and all(n in (1, m) for n, m in zip(value.shape, like.shape, strict=True))
        return value.expand_as(like) if constant else value  # a parameter is the same for every input

    def _evaluate(self, node: Node, acts: Acts, layout: Layout) -> Value:
        if node.kind == "number":
            return Value(torch.tensor(float(node.name), dtype=torch.float64))
        if node.kind == "name":
            point = self.scope.point(node.name, self.point)
            if point is not None:
                return Value(acts[point], self.scope.rows[point])
            return Value(cast(Tensor, self.scope.constant(node.name)))
        operands = [self._evaluate(operand, acts, layout) for operand in node.operands]
        if node.kind == "call":
            return self._call(node.name, operands[0], layout)
        left, right = (self._canonical(operand) for operand in operands)
        if node.kind == ".":
            right = right.repeat_interleave(left.shape[-2] // right.shape[-2], -2)
            return Value(torch.einsum("...qhd,...khd->...hqk", left, right), self.row)
        if node.kind == "of":
            right = right.repeat_interleave(left.shape[-3] // right.shape[-2], -2)
            return Value(torch.einsum("...hqk,...khd->...qhd", left, right), self.row)
        if left.shape != right.shape and left.numel() == right.numel():
            right = right.reshape(left.shape)
        operate = {"+": torch.add, "-": torch.sub, "*": torch.mul}[node.kind]
        return Value(operate(left, right), operands[0].row or operands[1].row)

    def _call(self, name: str, x: Value, layout: Layout) -> Value:
        module = self.scope.module(name)
        if module is not None:
            tensor = x.tensor if x.row is None else layout(x.tensor, x.row)
            result: object = module(tensor.clone())  # it may edit its input in place
            first: object = cast("tuple[object, ...]", result)[0] if isinstance(result, tuple) else result
            return Value(cast(Tensor, first), None, name)
        if name == "softmax":
            return x._replace(tensor=torch.exp(x.tensor - x.tensor.logsumexp(-1, keepdim=True)))
        if name in _ELEMENTWISE:
            return x._replace(tensor=_ELEMENTWISE[name](x.tensor))
        axes = (x.row or self.row).axes.split()
        tensor = x.tensor
        for axis in reversed(range(len(axes))):
            if axes[axis] not in self.row.axes.split():
                tensor = _REDUCTIONS[name](tensor, axis)
        return Value(tensor, self.row)

    def _canonical(self, value: Value) -> Tensor:
        """The tensor with the axes of a hook point."""
        place = self.row.place
        at_place = value.row is None and value.module == place.module and place.function is None and place.side == "out"
        return self.row.read(value.tensor, self.scope.sizes) if at_place else value.tensor


__all__ = ["Acts", "Formula", "Scope"]
