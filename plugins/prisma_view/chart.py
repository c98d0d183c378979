"""A chart of a result: which axes become rows, columns and panels, decided once for the screen and for paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from PIL.Image import Image

from prisma_core import InputError, Result, TokenLayout
from prisma_view.images import as_images
from prisma_view.table import GRAPH, Kind, Table

MOST_BARS = 40
MOST_EDGES = 120
TITLE = 92
"""How many characters of titles fit side by side."""
NAME = 48
"""How many characters of a name stand at an axis."""
CHANGES = ("change", "bound")
"""Axes of the changes of a series, whose bounds are low, best and high."""


@dataclass(frozen=True)
class Chart:
    """What is drawn: values with names for their axes, in panels of the same form.

    Attributes:
        values: ``[panel row column]``, of curves ``[panel line point]``, of bars ``[panel 1 bar]``, of a graph
            ``[1 source target]``, NaN where there is no edge.
        axes: the names of rows and columns (of lines and points).
        labels: along them.
        panels: a title for each.
        unit: what one number is; the title of the colour bar or of the axis of values.
        signed: zero is the middle of the scale.
        images: what lies under patches: nothing, one image for all panels, or one for each frame in turn.
        notes: sentences for the caption: baseline, total, what is left out.
        spans: of curves, where something happens along the points: the lower end, the best place and the upper end.
    """

    kind: Kind
    values: np.ndarray
    axes: tuple[str, str]
    labels: tuple[tuple[str, ...], tuple[str, ...]]
    panels: tuple[str, ...]
    title: str
    unit: str
    notes: tuple[str, ...] = ()
    images: tuple[Image, ...] = ()
    spans: tuple[tuple[float, float, float], ...] = ()

    def under(self, panel: int) -> Image | None:
        """Return the image that lies under the patches of a panel."""
        return self.images[panel % len(self.images)] if self.images else None

    @property
    def image(self) -> Image | None:
        """The image under the patches, of a video the first frame."""
        return self.under(0)

    def titles(self) -> list[list[str]]:
        """Return the title of each panel in lines that are no wider than the panels."""
        width = TITLE // self.grid[1]
        return [[cut(line, width) for line in title.split(" · ")] for title in self.panels]

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
        if self.kind == "graph":
            size = f"{int((~np.isnan(self.values)).sum())} edges"
        names = (self.labels[0][row], self.labels[1][column])
        if self.kind == "patches":
            names = tuple(f"{axis} {name}" for axis, name in zip(self.axes, names, strict=True))
        place = ("->" if self.kind == "graph" else " ").join(cut(x, NAME) for x in (self.panels[panel], *names) if x)
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
        kind: ``heat``, ``patches``, ``bars``, ``curves`` or ``graph``; None for the one that fits the axes.
        layout: where the patches are, for a token axis without the layout's names.
        image: what the model sees, under patches (see ``as_image``), or a video ``[1 frame channel height width]``.
        panels: the most panels; the caption states how many there are.

    Raises:
        InputError: there is nothing to draw, or the values do not have the axes that the kind needs.
    """
    if kind in (None, "curves") and result.axes == CHANGES and "series" in result.tensors:
        return _changes(result)
    if not result.values.numel():
        raise InputError(f"There is nothing to draw: the values are {list(result.values.shape)}.")
    if kind is not None and kind not in get_args(Kind):
        raise InputError(f"Expected a kind of {', '.join(get_args(Kind))}, got {kind!r}.")
    table = Table.of(result, layout, kind)
    kind = kind or table.kind()
    if kind == "patches":
        table, prefix = table.on_grid()
        rows, columns, notes = "row", "column", prefix
    elif kind == "bars":
        table, notes = table.with_total(result)
        rows, columns = "", table.bar_axis()
    elif kind == "graph":
        rows, columns, notes = *GRAPH, ()
    else:
        rows, columns, notes = *table.pair(kind), ()
    values, titles = table.panelled(rows, columns)
    values, missing = _finite(values)
    left_out = (f"{panels} of {len(titles)} panels are drawn; in Python, sel() chooses others.",) * (
        len(titles) > panels
    )
    labels = (table.labels.get(rows, ("",)), table.labels[columns])
    if kind == "bars":
        values, labels, more = _largest(values, labels)
        notes = (*notes, *more)
    if kind == "graph":
        values, notes = _strongest(values)
    common, shown = _common(titles[:panels])
    fixed = [f"{name} {place}" for name, place in table.fixed if (name, place) != ("batch", "0")]  # the only one
    about = [cut(each, TITLE) for each in (*fixed, *common)]
    unseen = ("The image is not drawn: it lies under patches alone. In Python, sel() chooses a token.",) * (
        image is not None and kind != "patches"
    )
    images = () if image is None else as_images(image, len(table.labels.get("frame", ("",))))
    baseline = (f"Against {result.baseline}.",) * bool(result.baseline)
    summed = kind == "bars" and any("sum" in note for note in notes)
    total = (f"Total: {result.total}.",) * (bool(result.total) and not summed)
    return Chart(
        kind, values[:panels], (rows, columns), (_distinct(labels[0]), _distinct(labels[1])), tuple(shown),
        ", ".join([_spoken(result.technique) or "values", *about]), result.unit or "value",
        (*baseline, *total, *notes, *missing * (kind != "graph"), *unseen, *left_out),
        images if kind == "patches" else (),
    )  # fmt: skip


def cut(text: str, width: int) -> str:
    """Return a text in one line of so many characters at most.

    >>> cut("yellow  star", 8)
    'yellow …'
    """
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return short names for an axis, no two of them the same, which would be one place: spaces without width part."""
    seen, distinct = dict[str, int](), list[str]()
    for name in names:
        short = cut(name, NAME)
        seen[short] = seen.get(short, -1) + 1
        distinct.append(short + "\u200b" * seen[short])
    return tuple(distinct)


def _finite(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return values with NaN for those that cannot be drawn, and a note of how many there are."""
    finite = np.isfinite(values)
    n = int((~finite).sum())
    return np.where(finite, values, np.nan), (f"{n} of {values.size} values are not finite, and not drawn.",) * (n > 0)


def _common(titles: list[str]) -> tuple[list[str], list[str]]:
    """Return the parts with which all titles of several panels begin, and the titles without them.

    >>> _common(["layer 0 · class cat", "layer 0 · class dog"])
    (['layer 0'], ['class cat', 'class dog'])
    """
    if len(titles) < 2:
        return [], titles
    parts = [title.split(" · ") for title in titles]
    n = next((n for n, each in enumerate(zip(*parts, strict=True)) if len(set(each)) > 1), 0)
    return parts[0][:n], [" · ".join(each[n:]) for each in parts]


def _changes(result: Result) -> Chart:
    """Return a series with its pieces, and the changes between them with their intervals."""
    series, fitted = (result.tensors[name].double().cpu() for name in ("series", "fitted"))
    steps = tuple(result.facts.get("checkpoints") or map(str, range(len(series))))
    spans = tuple((low, best, high) for low, best, high in result.values.double().tolist())
    names = [
        f"{steps[int(best)]} ({steps[int(low)]} to {steps[min(int(high), len(steps) - 1)]})"
        for low, best, high in spans
    ]
    found = f"Changes at {', '.join(names)}." if names else "No change."
    lines = np.stack([series.numpy(), fitted.numpy()])[None]
    return Chart(
        "curves", lines, ("line", "checkpoint"), (("series", "pieces"), steps),
        ("",), _spoken(result.technique), result.facts.get("unit") or "value",
        (found, *((f"Against {result.baseline}.",) * bool(result.baseline))), spans=spans,
    )  # fmt: skip


def _strongest(values: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Keep the strongest edges; those of weight 0 are none."""
    sizes = np.abs(np.nan_to_num(values))
    n = int((sizes > 0).sum())
    least = np.sort(sizes, None)[-min(MOST_EDGES, sizes.size)]
    kept = np.where((sizes > 0) & (sizes >= least), values, np.nan)
    return kept, (f"The strongest {MOST_EDGES} of {n} edges are drawn.",) * (n > MOST_EDGES)


def _largest(values: np.ndarray, labels: Any) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    """Keep the largest bars, and put the others into one, so that what is drawn has the same sum."""
    names: Sequence[str] = labels[1]
    if len(names) <= MOST_BARS:
        return values, labels, ()
    last = [len(names) - 1] if names[-1] == "sum" else []
    size = np.nan_to_num(np.abs(values)).max((0, 1))
    size[last] = np.inf
    chosen = np.sort(np.argsort(-size, kind="stable")[:MOST_BARS])
    others = np.setdiff1d(np.arange(len(names)), chosen)
    rest = np.nansum(values[..., others], -1, keepdims=True)
    kept = [index for index in chosen if index not in last]
    values = np.concatenate([values[..., kept], rest, values[..., last]], -1)
    drawn = (*(names[i] for i in kept), f"{len(others)} others", *(names[i] for i in last))
    return values, (labels[0], drawn), (f"The {len(kept)} largest of {len(names) - len(last)} bars.",)


def _spoken(technique: str) -> str:
    return technique if "." in technique else technique.replace("_", " ")
