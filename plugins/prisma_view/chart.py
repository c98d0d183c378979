"""A chart of a result: which axes become rows, columns and panels, decided once for the screen and for paper."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from PIL.Image import Image

from prisma_core import InputError, Result, TokenLayout
from prisma_view.images import as_image

Kind = Literal["heat", "patches", "bars", "curves"]
ORDERED = ("layer", "place", "stage", "step", "epoch", "checkpoint", "strength", "k", "size", "fraction")
"""Axes along which values are a curve."""
PAIRS = (("layer", "head"), ("query_pos", "key_pos"), ("pos", "source"), ("layer", "pos"), ("layer", "class"))
"""Axes that are rows and columns of a heat map where a result has both."""
MOST_BARS = 40
MOST_LINES = 8
_PATCH = re.compile(r"(?:f(\d+))?r(\d+)c(\d+)")


@dataclass(frozen=True)
class Chart:
    """What is drawn: values with names for their axes, in panels of the same form.

    Attributes:
        values: ``[panel row column]``, of curves ``[panel line point]``, of bars ``[panel 1 bar]``.
        axes: the names of rows and columns (of lines and points).
        labels: along them.
        panels: a title for each.
        unit: what one number is; the title of the colour bar or of the axis of values.
        signed: zero is the middle of the scale.
        image: what lies under the patches.
        notes: sentences for the caption: baseline, total, what is left out.
    """

    kind: Kind
    values: np.ndarray
    axes: tuple[str, str]
    labels: tuple[tuple[str, ...], tuple[str, ...]]
    panels: tuple[str, ...]
    title: str
    unit: str
    notes: tuple[str, ...] = ()
    image: Image | None = None

    @property
    def signed(self) -> bool:
        return bool(np.nanmin(self.values, initial=0) < 0)

    @property
    def limits(self) -> tuple[float, float]:
        """The values at the two ends of the colour scale: the same around 0 where values have a sign."""
        finite = self.values[np.isfinite(self.values)]
        if not finite.size:
            return 0.0, 1.0
        low, high = float(finite.min()), float(finite.max())
        if self.signed:
            most = max(-low, high)
            return -most, most
        start = low if low > high / 2 else 0.0
        return start, high if high > start else start + 1.0

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of panels."""
        columns = min(len(self.panels), 4, math.ceil(math.sqrt(len(self.panels))))
        return math.ceil(len(self.panels) / columns), columns

    def describe(self) -> str:
        """Return the chart in words, for those who do not see it."""
        rows, columns = self.values.shape[1:]
        at = np.nanargmax(np.abs(self.values)) if np.isfinite(self.values).any() else 0
        panel, row, column = np.unravel_index(at, self.values.shape)
        size = (
            f"{columns} {self.axes[1]}" if self.kind == "bars" else f"{rows} {self.axes[0]} by {columns} {self.axes[1]}"
        )
        place = " ".join(x for x in (self.panels[panel], self.labels[0][row], self.labels[1][column]) if x)
        return (
            f"{self.title or self.kind}: {size}. Largest: {place}, {self.values[panel, row, column]:.3g} {self.unit}."
        )


def chart_of(
    result: Result,
    *,
    kind: Kind | None = None,
    layout: TokenLayout | None = None,
    image: Any = None,
    panels: int = 12,
) -> Chart:
    """Return the chart that fits a result.

    Args:
        kind: ``heat``, ``patches``, ``bars`` or ``curves``; None for the one that fits the axes.
        layout: where the patches are, for a token axis without the layout's names.
        image: what the model sees, under patches (see ``as_image``).
        panels: the most panels; the caption states how many there are.

    Raises:
        InputError: there is nothing to draw, or the values do not have the axes that the kind needs.
    """
    if not result.values.numel():
        raise InputError(f"There is nothing to draw: the values are {list(result.values.shape)}.")
    if kind is not None and kind not in get_args(Kind):
        raise InputError(f"Expected a kind of {', '.join(get_args(Kind))}, got {kind!r}.")
    table = _Table.of(result, layout)
    kind = kind or table.kind()
    if kind == "patches":
        table, prefix = table.on_grid()
        rows, columns, notes = "row", "column", prefix
    elif kind == "bars":
        table, notes = table.with_total(result)
        rows, columns = "", table.bar_axis()
    else:
        rows, columns, notes = *table.pair(kind), ()
    values, titles = table.panelled(rows, columns)
    left_out = (f"{panels} of {len(titles)} panels are drawn: choose others with sel().",) * (len(titles) > panels)
    labels = (table.labels.get(rows, ("",)), table.labels[columns])
    if kind == "bars":
        values, labels, more = _largest(values, labels)
        notes = (*notes, *more)
    about = [f"{name} {size}" for name, size in table.fixed]
    baseline = (f"Against {result.baseline}.",) * bool(result.baseline)
    total = (f"Total: {result.total}.",) * bool(result.total)
    return Chart(
        kind, values[:panels], (rows, columns), labels, tuple(titles[:panels]),
        ", ".join([_spoken(result.technique) or "values", *about]), result.unit or "value",
        (*baseline, *total, *notes, *left_out), None if image is None else as_image(image),
    )  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """Values with axes and labels; axes of one place are ``fixed``."""

    values: np.ndarray
    axes: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]
    fixed: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, result: Result, layout: TokenLayout | None) -> _Table:
        values = result.values.double().cpu().numpy()
        labels = {axis: result.names(axis) for axis in result.axes}
        for axis in result.axes:
            if layout is not None and axis not in result.labels:
                names = layout.token_names()
                sizes = {layout.n_tokens: names, layout.n_patches: names[layout.n_prefix :]}
                labels[axis] = tuple(sizes.get(len(labels[axis]), labels[axis]))
        gone = [axis for axis, size in result.shape.items() if size == 1]
        axes = tuple(axis for axis in result.axes if axis not in gone)
        fixed = tuple((axis, labels[axis][0]) for axis in gone)
        return cls(values.reshape([len(labels[axis]) for axis in axes]), axes, labels, fixed)

    def tokens(self) -> list[str]:
        """Return the axes along which tokens have the names of a layout."""
        return [axis for axis in self.axes if sum(map(bool, map(_PATCH.fullmatch, self.labels[axis]))) > 1]

    def kind(self) -> Kind:
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

    def with_total(self, result: Result) -> tuple[_Table, tuple[str, ...]]:
        """Return the table with a constant and the sum as further bars, where the result has a total."""
        table = self if self.axes else _Table(self.values.reshape(1), ("value",), {"value": ("value",)}, self.fixed)
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
        return _Table(np.concatenate(parts, at), table.axes, labels, table.fixed), ("The last bar is the sum.",)

    def on_grid(self) -> tuple[_Table, tuple[str, ...]]:
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
        return _Table(grid, axes, labels, self.fixed), words

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


def _largest(values: np.ndarray, labels: Any) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    """Keep the largest bars, and put the others into one, so that what is drawn has the same sum."""
    names: Sequence[str] = labels[1]
    if len(names) <= MOST_BARS:
        return values, labels, ()
    last = [len(names) - 1] if names[-1] == "sum" else []
    size = np.abs(values).max((0, 1))
    size[last] = np.inf
    chosen = np.sort(np.argsort(-size, kind="stable")[:MOST_BARS])
    others = np.setdiff1d(np.arange(len(names)), chosen)
    rest = values[..., others].sum(-1, keepdims=True)
    kept = [index for index in chosen if index not in last]
    values = np.concatenate([values[..., kept], rest, values[..., last]], -1)
    drawn = (*(names[i] for i in kept), f"{len(others)} others", *(names[i] for i in last))
    return values, (labels[0], drawn), (f"The {len(kept)} largest of {len(names) - len(last)} bars.",)


def _spoken(technique: str) -> str:
    return technique if "." in technique else technique.replace("_", " ")


def _range(values: np.ndarray) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
