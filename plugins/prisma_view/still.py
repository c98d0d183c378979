"""Still images of charts for papers, drawn with matplotlib: PNG, SVG, PDF."""

from __future__ import annotations

import base64
import functools
import io
import textwrap
from itertools import chain
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from prisma_view.chart import Chart
from prisma_view.colours import CLASSES, LESS, MORE
from prisma_view.graphs import drawing

LINES = (CLASSES[4], CLASSES[5], CLASSES[2], CLASSES[6], CLASSES[1], CLASSES[0], CLASSES[7], CLASSES[9])
"""Colours of curves, apart for colour-blind eyes; each line has a marker of its own as well."""
MARKERS = "os^Dvp*X"
TICKS = 16


def draw(chart: Chart) -> Figure:
    """Return a chart as a matplotlib figure."""
    rows, columns = chart.grid
    tall, wide = chart.values.shape[1:]
    if chart.kind == "bars":
        size = (max(5, 3.6 * columns), 0.9 + rows * max(1.4, 0.23 * wide))
    elif chart.kind == "graph":
        size = (7, 1.0 + 0.55 * drawing(chart).levels)
    elif chart.kind == "curves":
        size = (max(5, 3.4 * columns), 0.9 + 2.6 * rows)
    else:
        side = 5.2 if len(chart.panels) == 1 else 9 / columns
        longest = 0 if chart.kind == "patches" else max(map(len, chart.labels[1]))
        room = 0.05 * max(0, longest - 16)  # for names that stand upright below an axis
        size = (1.4 + columns * side, 0.9 + room + rows * (min(max(side * tall / wide, 0.9), 1.3 * side) + 0.35))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(chain.from_iterable(grid))
    for axis in axes[len(chart.panels) :]:
        axis.remove()
    titles = chart.titles()
    for panel, axis in enumerate(axes[: len(chart.panels)]):
        axis.set_title("\n".join(plain(line) for line in titles[panel]), fontsize=9)
        panel_of(chart, axis, panel)
    if chart.kind in ("heat", "patches"):
        scale(chart, figure, axes[: len(chart.panels)])
    figure.suptitle(plain(chart.title), fontsize=11)
    if chart.notes:
        figure.supxlabel(plain("  ".join(chart.notes)), fontsize=7, wrap=True)
    return figure


def panel_of(chart: Chart, axis: Any, panel: int = 0) -> None:
    """Draw a panel of a chart into matplotlib's axes."""
    {"heat": _heat, "patches": _heat, "bars": _bars, "curves": _curves, "graph": _graph}[chart.kind](axis, chart, panel)


def scale(chart: Chart, figure: Figure, axes: Any) -> None:
    """Draw the colour bar of a heat map beside its axes."""
    figure.colorbar(ScalarMappable(Normalize(*chart.limits), _map(chart)), ax=axes, label=_unit(chart))


def png(chart: Chart, dpi: int = 80) -> str:
    """Return a chart as the data URI of a PNG."""
    return "data:image/png;base64," + base64.b64encode(encoded(draw(chart), "png", dpi)).decode()


def encoded(figure: Figure, form: str, dpi: int) -> bytes:
    """Return a figure as a file: matplotlib's writer of PDF fails in its own way where a disk is full."""
    stream = io.BytesIO()
    figure.savefig(stream, format=form, dpi=dpi)
    return stream.getvalue()


def plain(text: str) -> str:
    """Return a label without formulas, and without characters that the font lacks (emoji), which would be boxes."""
    known = "".join(each for each in text if _font().get_char_index(ord(each)))
    return " ".join(known.split()).replace("$", r"\$")


@functools.cache
def _font() -> Any:
    return get_font(findfont(FontProperties()))


def _unit(chart: Chart) -> str:
    return textwrap.fill(plain(chart.unit), 36)


def _map(chart: Chart) -> str:
    return "RdBu_r" if chart.signed else "viridis"


def _heat(axis: Any, chart: Chart, panel: int) -> None:
    low, high = chart.limits
    tall, wide = chart.values.shape[1:]
    bare, extent = chart.kind == "patches", (-0.5, wide - 0.5, tall - 0.5, -0.5)
    image = chart.under(panel)
    if image is not None:
        axis.imshow(np.asarray(image.convert("L")), cmap="gray", extent=extent)
    axis.imshow(
        chart.values[panel], cmap=_map(chart), vmin=low, vmax=high, extent=extent, interpolation="nearest",
        alpha=1 if image is None else 0.62, aspect="equal" if bare else "auto",
    )  # fmt: skip
    if bare:
        axis.set_axis_off()
        return
    axis.set(xlabel=plain(chart.axes[1]), ylabel=plain(chart.axes[0]))
    _ticks(axis.xaxis, chart.labels[1])
    _ticks(axis.yaxis, chart.labels[0])


def _ticks(axis: Any, names: tuple[str, ...]) -> None:
    at = range(0, len(names), max(1, -(-len(names) // TICKS)))
    shown = [plain(names[i]) for i in at]
    axis.set_ticks(list(at), shown, fontsize=7)
    if axis.axis_name == "x" and max(map(len, shown)) > 3:
        axis.set_tick_params(rotation=60)


def _bars(axis: Any, chart: Chart, panel: int) -> None:
    values, names = chart.values[panel, 0], chart.labels[1]
    colours = [np.array(MORE if value >= 0 else LESS) / 255 for value in values]
    if names[-1] == "sum":
        colours[-1] = np.full(3, 0.45)
    axis.barh(range(len(values)), values, color=colours)
    axis.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="0.5", linewidth=0.6)
    axis.set(xlabel=_unit(chart), ylabel=plain(chart.axes[1]))


def _curves(axis: Any, chart: Chart, panel: int) -> None:
    names, points = chart.labels
    for line, name in enumerate(names):
        colour = np.array(LINES[line % len(LINES)]) / 255
        axis.plot(range(len(points)), chart.values[panel, line], marker=MARKERS[line % len(MARKERS)], markersize=4,
                  color=colour, label=plain(name))  # fmt: skip
    if len(names) > 1:
        axis.legend(fontsize=7, frameon=False)
    axis.grid(alpha=0.25)
    axis.set(xlabel=plain(chart.axes[1]), ylabel=_unit(chart))
    _ticks(axis.xaxis, points)
    for low, best, high in chart.spans:
        axis.axvspan(low - 0.5, high - 0.5, color="0.5", alpha=0.25, linewidth=0)
        axis.axvline(best - 0.5, color="0.4", linestyle="--", linewidth=1)


def _graph(axis: Any, chart: Chart, panel: int) -> None:
    shown = drawing(chart)
    for edge in shown.edges:
        (one, two), colour = (edge.start, edge.end), np.array(MORE if edge.weight >= 0 else LESS) / 255
        axis.plot([one[0], two[0]], [one[1], two[1]], color=colour, linewidth=edge.width / 2, alpha=0.75, zorder=1)
    for name, (x, y) in shown.nodes.items():
        axis.scatter([x], [y], s=36, color="0.45", zorder=2)
        axis.annotate(plain(name), (x, y), (5, 0), textcoords="offset points", fontsize=7, va="center", zorder=3)
    axis.set_axis_off()
    axis.set_title(plain(f"{chart.unit}: orange positive, blue negative"), fontsize=8)
