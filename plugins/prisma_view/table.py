"""The values of a result as a table: which axes are rows and columns, and which kind of chart fits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prisma_core import InputError, Result, TokenLayout

Kind = Literal["heat", "patches", "bars", "curves", "graph"]
ORDERED = ("layer", "place", "stage", "step", "epoch", "checkpoint", "strength", "k", "size", "fraction")
"""Axes along which values are a curve."""
PAIRS = (("layer", "head"), ("query_pos", "key_pos"), ("pos", "source"), ("layer", "pos"), ("layer", "class"))
"""Axes that are rows and columns of a heat map where a result has both."""
GRAPH = ("source", "target")
"""Axes of the weights of a graph's edges."""
MOST_LINES = 8
_PATCH = re.compile(r"(?:f(\d+))?r(\d+)c(\d+)")


@dataclass(frozen=True)
class Table:
    """Values with axes and labels; axes of one place are ``fixed``."""

    values: np.ndarray
    axes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]
    fixed: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, result: Result, layout: TokenLayout | None, kind: Kind | None = None) -> Table:
        """Return the table of a result; a kind that needs a pair of axes keeps it, of whatever size."""
        values = result.values.double().cpu().numpy()
        labels = {axis: result.names(axis) for axis in result.axes}
        for axis in result.axes:
            if layout is not None and axis not in result.labels:
                names = layout.token_names()
                sizes = {layout.n_tokens: names, layout.n_patches: names[layout.n_prefix :]}
                labels[axis] = tuple(sizes.get(len(labels[axis]), labels[axis]))
        pairs = [pair for pair in (GRAPH, *PAIRS) if set(pair) <= set(result.axes)] if kind in ("heat", "graph") else []
        kept = pairs[0] if pairs else ()
        gone = [axis for axis, size in result.shape.items() if size == 1 and axis not in kept]
        axes = tuple(axis for axis in result.axes if axis not in gone)
        fixed = tuple((axis, labels[axis][0]) for axis in gone)
        return cls(values.reshape([len(labels[axis]) for axis in axes]), axes, labels, fixed)

    def tokens(self) -> list[str]:
        """Return the axes along which tokens have the names of a layout."""
        return [axis for axis in self.axes if sum(map(bool, map(_PATCH.fullmatch, self.labels[axis]))) > 1]

    def kind(self) -> Kind:
        if self.axes == GRAPH:
            return "graph"
        if {"row", "column"} <= set(self.axes) or len(self.tokens()) == 1:
            return "patches"
        if len(self.axes) <= 1:
            return "curves" if self.axes and self.axes[0] in ORDERED and len(self.labels[self.axes[0]]) > 2 else "bars"
        if any({one, two} <= set(self.axes) for one, two in PAIRS) or self.axes[0] not in ORDERED:
            return "heat"
        return "curves" if len(self.labels[self.axes[1]]) <= MOST_LINES else "heat"

    def pair(self, kind: Kind) -> tuple[str, str]:
        """Return the axes of rows and columns; of curves, of lines and points."""
        if kind == "curves":
            point = next((axis for axis in self.axes if axis in ORDERED), self.axes[-1] if self.axes else "")
            lines = [axis for axis in self.axes if axis != point and len(self.labels[axis]) <= MOST_LINES]
            if not point:
                raise InputError("A curve needs an axis of more than one place; kind='bars' draws single values.")
            return (lines[0] if lines else ""), point
        pairs = [pair for pair in PAIRS if set(pair) <= set(self.axes)]
        if len(self.axes) < 2:
            raise InputError(
                f"A heat map needs two axes; there are {', '.join(self.axes) or 'none'}. Take kind='bars'."
            )
        return pairs[0] if pairs else (self.axes[-2], self.axes[-1])

    def bar_axis(self) -> str:
        return max(self.axes, key=lambda axis: len(self.labels[axis])) if "component" not in self.axes else "component"

    def with_total(self, result: Result) -> tuple[Table, tuple[str, ...]]:
        """Return the table with a constant and the sum as further bars, where the result has a total."""
        whole = result.total.partition(", with tensors[")[0]  # these are bars too
        table = self if self.axes else Table(self.values.reshape(1), ("value",), {"value": ("value",)}, self.fixed)
        if not result.total and "constant" not in result.tensors:
            return table, ()
        axis = table.bar_axis()
        at, names = table.axes.index(axis), table.labels[axis]
        parts, more = [table.values], []
        shape = [size for place, size in enumerate(table.values.shape) if place != at]
        for name in ("rest", "constant"):
            part = result.tensors.get(name)
            if part is not None and part.numel() == math.prod(shape):
                parts.append(np.expand_dims(part.double().cpu().numpy().reshape(shape), at))
                more.append(name)
        parts.append(np.concatenate(parts, at).sum(at, keepdims=True))
        labels = {**table.labels, axis: (*names, *more, "sum")}
        return Table(np.concatenate(parts, at), table.axes, labels, table.fixed), (
            f"The last bar is the sum{whole and f': {whole}'}.",
        )

    def on_grid(self) -> tuple[Table, tuple[str, ...]]:
        """Return the table with its token axis unfolded to rows and columns, and the tokens that are no patch in words.

        Raises:
            InputError: there is no token axis with the names of a layout.
        """
        if {"row", "column"} <= set(self.axes):
            return self, ()
        tokens = self.tokens()
        if not tokens:
            raise InputError(
                f"Patches need axes row and column, or tokens named by a layout: pass layout=model.layout. The axes "
                f"are {', '.join(self.axes) or 'none'}."
            )
        axis = tokens[-1]
        names, values = self.labels[axis], np.moveaxis(self.values, self.axes.index(axis), -1)
        places = [(index, match) for index, name in enumerate(names) if (match := _PATCH.fullmatch(name))]
        at = np.array([[int(match[1] or 0), int(match[2]), int(match[3])] for _, match in places])
        size = at.max(0) + 1
        grid = np.full((*values.shape[:-1], *size), np.nan)
        grid[(..., *at.T)] = values[..., [index for index, _ in places]]
        others = [(name, values[..., index]) for index, name in enumerate(names) if not _PATCH.fullmatch(name)]
        words = tuple(f"{name}: {_range(value)}." for name, value in others)
        axes = (*(each for each in self.axes if each != axis), "frame", "row", "column")
        labels = {**self.labels} | {
            each: tuple(map(str, range(n))) for each, n in zip(("frame", "row", "column"), size, strict=True)
        }
        if size[0] == 1:
            axes, grid = tuple(each for each in axes if each != "frame"), grid[..., 0, :, :]
        return Table(grid, axes, labels, self.fixed), words

    def panelled(self, rows: str, columns: str) -> tuple[np.ndarray, list[str]]:
        """Return ``[panel row column]`` and a title for each panel; an empty name of rows is one row."""
        missing = [axis for axis in (rows, columns) if axis and axis not in self.axes]
        if missing:
            raise InputError(f"This kind needs an axis {missing[0]}; there are {', '.join(self.axes) or 'none'}.")
        rest = [axis for axis in self.axes if axis not in (rows, columns)]
        order = [*rest, *((rows,) if rows else ()), columns]
        values = np.transpose(self.values, [self.axes.index(axis) for axis in order])
        sizes = [len(self.labels[axis]) for axis in rest]
        titles = [
            " · ".join(f"{axis} {self.labels[axis][i]}" for axis, i in zip(rest, place, strict=True))
            for place in np.ndindex(*sizes)
        ]
        shape = (len(titles), len(self.labels[rows]) if rows else 1, len(self.labels[columns]))
        return values.reshape(shape), titles


def _range(values: np.ndarray) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
