"""Formulas behind the ``=`` of a hook map's rows, evaluated on activations and upstream's own modules.

A formula is made of

- hook points, without ``hook_``: ``resid_pre``, ``mlp.pre``; looked for in the part of the row's hook point and then in
  the parts around it: ``ln1.normalized`` in a row of ``blocks.3.attn.hook_q`` is ``blocks.3.ln1.hook_normalized``. A
  name in full, ``blocks.3.ln1.hook_normalized``, is that hook point wherever it stands;
- ``input``, the model's input; and upstream's parameters, buffers and numbers by their paths: ``pos_embed``;
- upstream's modules, called: ``blocks.3.norm1(resid_pre)``, ``blocks.3.mlp.fc2(mlp.post)``;
- ``softmax(x)`` over the last axis, ``mean(x)`` and ``first(x)`` over the axes that the row's hook point lacks, and
  the activations of torch.nn.functional: ``gelu(x)``, ``hardswish(x)``, ...;
- ``a + b``, ``a - b``, ``a * b``; ``q . k``, the products of queries and keys; ``pattern v``, a pattern times values,
  head by head where one of the hook points has an axis ``head``.

A text with any other word is prose: it explains a hook point, and proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.checks.grammar import Node, Prose, nodes, parse
from prisma_conformance.measure import worst
from prisma_core.plugin import PrismaError, Row

Acts = Mapping[str, Tensor]
Layout = Callable[[Tensor, Row], Tensor]  # of an activation with the axes of a row, as a module takes it
When = Literal["at its place", "at once", "at the end"]  # the row's einops pattern turns what modules return

_ACTIVATIONS = (
    "relu relu6 elu selu celu gelu silu mish softplus softsign hardtanh hardswish hardsigmoid leaky_relu sigmoid"
)
_ELEMENTWISE: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    **{name: getattr(F, name) for name in _ACTIVATIONS.split()},
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
        point, or with heads side by side: a model may permute and fold axes in between. What they return is as at the
        place of this hook point, from there on or up to the end. The smallest error counts.

        Raises:
            PrismaError: it can be evaluated in no layout, with the shapes of what it reads.
        """
        errors: list[float] = []
        problems: list[Exception] = []
        for when in self._readings:
            for layout in (self._at_own_place, self._at_this_place, self._heads_side_by_side):
                try:
                    errors.append(worst(left[self.point], self._value(right, layout, when, left[self.point])))
                except Exception as problem:  # noqa: BLE001  # upstream's modules refuse shapes in their own ways
                    problems.append(problem)
                if errors and errors[-1] <= tolerances.FLOAT64:
                    return errors[-1]
        if not errors:
            kind = type(problems[0]).__name__
            raise PrismaError(f"{kind}: {problems[0]}; it reads {self._shapes(right)}") from problems[0]
        return min(errors)

    @property
    def _readings(self) -> Sequence[When]:
        calls = [node for node in nodes(self._node) if node.kind == "call" and self.scope.module(node.name) is not None]
        return ("at its place", "at once", *(("at the end",) if calls else ()))

    def _shapes(self, acts: Acts) -> str:
        """The tensors that the formula reads, with shapes and axes."""
        shapes: dict[str, str] = {}
        for node in (node for node in nodes(self._node) if node.kind == "name"):
            point = self.scope.point(node.name, self.point)
            tensor = acts[point] if point is not None else cast(Tensor, self.scope.constant(node.name))
            axes = f" ({self.scope.rows[point].axes})" if point is not None else ""
            shapes[node.name] = f"{node.name} {list(tensor.shape)}{axes}"
        return ", ".join(shapes.values())

    def __str__(self) -> str:
        return f"{self.point} = {self.text}"

    # ---------------------------------------------------------------- evaluation

    def _at_own_place(self, tensor: Tensor, row: Row) -> Tensor:
        return row.write(tensor, self.scope.sizes)

    def _at_this_place(self, tensor: Tensor, row: Row) -> Tensor:
        return self.row.write(tensor, self.scope.sizes)

    def _heads_side_by_side(self, tensor: Tensor, row: Row) -> Tensor:
        return tensor.flatten(-2)

    def _value(self, acts: Acts, layout: Layout, when: When, like: Tensor) -> Tensor:
        result = self._evaluate(self._node, acts, layout, when)
        value = self._canonical(result, when, end=True)
        if value.numel() == like.numel():  # some keep rows and columns apart, some do not
            return value.reshape(like.shape)
        constant = value.ndim == like.ndim and all(n in (1, m) for n, m in zip(value.shape, like.shape, strict=True))
        return value.expand_as(like) if constant else value  # a parameter is the same for every input

    def _evaluate(self, node: Node, acts: Acts, layout: Layout, when: When) -> Value:
        if node.kind == "number":
            return Value(torch.tensor(float(node.name), dtype=torch.float64))
        if node.kind == "name":
            point = self.scope.point(node.name, self.point)
            if point is not None:
                return Value(acts[point], self.scope.rows[point])
            return Value(cast(Tensor, self.scope.constant(node.name)))
        operands = [self._evaluate(operand, acts, layout, when) for operand in node.operands]
        if node.kind == "call":
            return self._call(node.name, operands[0], layout)
        left, right = (self._canonical(operand, when) for operand in operands)
        if node.kind in (".", "of"):
            return Value(self._product(node.kind, left, right, [one.row for one in operands]), self.row)
        if left.shape != right.shape and left.numel() == right.numel():
            right = right.reshape(left.shape)
        operate = {"+": torch.add, "-": torch.sub, "*": torch.mul}[node.kind]
        row = operands[0].row or operands[1].row or (self.row if when == "at once" else None)
        module = operands[0].module or operands[1].module
        return Value(operate(left, right), row, module if when == "at the end" and row is None else None)

    def _product(self, kind: str, left: Tensor, right: Tensor, rows: Sequence[Row | None]) -> Tensor:
        """Products of queries and keys, or a pattern times values, head by head where any of them has heads."""
        headed = any("head" in row.axes.split() for row in (self.row, *rows) if row is not None)
        h = "h" if headed else ""
        if headed:  # several heads of queries may share keys and values
            right = right.repeat_interleave(left.shape[-2 if kind == "." else -3] // right.shape[-2], -2)
        pattern = f"...q{h}d,...k{h}d->...{h}qk" if kind == "." else f"...{h}qk,...k{h}d->...q{h}d"
        return torch.einsum(pattern, left, right)

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

    def _canonical(self, value: Value, when: When, end: bool = False) -> Tensor:
        """The tensor with the axes of a hook point."""
        place = self.row.place
        at_place = value.module == place.module and place.function is None and place.side == "out"
        if value.row is not None or (when == "at the end" and not end):
            return value.tensor
        if value.module is None:
            return self._constant(value.tensor) if when == "at once" else value.tensor
        return self.row.read(value.tensor, self.scope.sizes) if at_place or when != "at its place" else value.tensor

    def _constant(self, tensor: Tensor) -> Tensor:
        """A parameter that has the axes of this hook point's place, such as positions, with those of the hook point."""
        try:
            return self.row.read(tensor, {**self.scope.sizes, "batch": len(tensor)}) if tensor.ndim > 1 else tensor
        except PrismaError:
            return tensor


__all__ = ["Acts", "Formula", "Scope"]
