"""Charts as Plotly figures: heat maps, patches, bars and curves."""

from __future__ import annotations

import textwrap
from collections import Counter
from html import escape
from typing import Any, TypeVar

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prisma_view import still
from prisma_view.chart import Chart
from prisma_view.colours import LESS, MORE
from prisma_view.graphs import drawing
from prisma_view.images import data_uri

FigureType = TypeVar("FigureType", bound=go.Figure)
INK = "#767676"
"""Grey that is legible (4.5:1) on white and on black, since a notebook's background is not ours."""
LINES = "rgba(128,128,128,.25)"
CLEAR = "rgba(0,0,0,0)"
MOST_GAPS = 60
"""Cells side by side that have lines between them; more are too small for lines."""
BUTTONS = ["sendChartToCloud", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
"""Buttons of Plotly's that figures do without: the first would upload it, the others repeat zoom and reset."""
CAPTION = 72
"""Characters of a line of the caption."""
PANELS, BESIDE = 620, 170
"""Pixels across all panels, for which heights are chosen, and of what stands beside them: names and colour bar."""
FIT = f"""const fit = ({{ data, layout }}, width) => {{
  if (data[0].type !== "heatmap" || data[0].x) return;
  const {{ t, b }} = layout.margin, share = Math.min(1, Math.max(0.3, (width - {BESIDE}) / {PANELS}));
  layout.height = t + b + (layout.height - t - b) * share;
}};"""
"""JavaScript that makes patches, which keep their form, no taller than they are in a box of some width."""
OVER = 0.62
"""How much of an image the colours above it cover."""


def draw(chart: Chart, figure: FigureType) -> FigureType:
    """Return a figure with a chart drawn into it."""
    rows, columns = chart.grid
    titles = ["<br>".join(map(escape, lines)) for lines in chart.titles()] if any(chart.panels) else None
    make_subplots(
        rows, columns, subplot_titles=titles, figure=figure, shared_yaxes=chart.kind == "heat",
        horizontal_spacing=0.02 if chart.kind == "patches" else 0.06 / max(1, columns - 1),
        vertical_spacing=_gap(chart) / _height(chart, rows, columns) if rows > 1 else 0,
    )  # fmt: skip
    {"heat": _heat, "patches": _heat, "bars": _bars, "curves": _curves, "graph": _graph}[chart.kind](figure, chart)
    figure.update_annotations(font_size=12)
    low, high = chart.limits
    lines = [line for note in chart.notes for line in textwrap.wrap(note, CAPTION)]
    height = _height(chart, rows, columns)
    figure.update_layout(
        title={
            "text": escape(chart.title), "x": 0.01, "y": 1, "yanchor": "top", "pad": {"t": 34},
            "subtitle": {"text": "<br>".join(map(escape, lines)), "font": {"size": 12}},
        },
        font={"color": INK, "family": "system-ui, sans-serif"},
        paper_bgcolor=CLEAR, plot_bgcolor=CLEAR, height=height,
        modebar={"bgcolor": CLEAR, "color": INK, "activecolor": _rgb(LESS), "remove": BUTTONS},
        margin={
            "l": 60, "r": 60 if chart.kind == "graph" else 20, "b": 55,  # names stand on the right of a graph's nodes
            "t": 76 + 16 * len(lines) + (6 + 14 * _lines(chart)) * bool(titles),
        },
        coloraxis={
            "colorscale": "RdBu_r" if chart.signed else "Viridis", "cmin": low, "cmax": high,
            "colorbar": {"title": {"text": escape(chart.unit), "side": "right"}, "thickness": 14},
        },
    )  # fmt: skip
    figure.update_xaxes(gridcolor=LINES, zerolinecolor=LINES)
    figure.update_yaxes(gridcolor=LINES, zerolinecolor=LINES)
    return figure


def least_width(chart: Chart) -> int:
    """Return the pixels below which a figure is no narrower, but scrolls: panels side by side need their room."""
    columns = chart.grid[1]
    if chart.kind == "graph":
        return 80 * Counter(y for _, y in drawing(chart).nodes.values()).most_common(1)[0][1]
    return BESIDE + 150 * columns if columns > 1 else 0


def _gap(chart: Chart) -> int:
    """Return how many pixels lie between rows of panels, for titles and what is below an axis."""
    return {"patches": 20, "heat": 40}.get(chart.kind, 70) + 14 * _lines(chart)


def _lines(chart: Chart) -> int:
    """Return of how many lines the titles of panels are."""
    return max(map(len, chart.titles()))


def _height(chart: Chart, rows: int, columns: int) -> int:
    if chart.kind == "graph":
        return 150 + 64 * drawing(chart).levels
    if chart.kind == "curves":
        return 130 + 280 * rows
    if chart.kind == "bars":
        return 140 + rows * max(160, 22 * chart.values.shape[-1])
    tall, wide = chart.values.shape[1:]
    side = PANELS / columns
    return round(min(170 + rows * (min(max(side * tall / wide, 90), side * 1.2) + _gap(chart)), 2400))


def _cells(chart: Chart) -> list[tuple[int, int, int]]:
    columns = chart.grid[1]
    return [(panel, panel // columns + 1, panel % columns + 1) for panel in range(len(chart.panels))]


def _heat(figure: go.Figure, chart: Chart) -> None:
    x, y = ([escape(name) for name in names] for names in chart.labels[::-1])
    bare = chart.kind == "patches"
    gap = 0 if bare or max(chart.values.shape[1:]) * chart.grid[1] > MOST_GAPS else 1
    for panel, row, column in _cells(chart):
        image = chart.under(panel)
        figure.add_trace(
            go.Heatmap(
                z=chart.values[panel], x=None if bare else x, y=None if bare else y, coloraxis="coloraxis",
                opacity=1 if image is None else OVER, hoverongaps=False, xgap=gap, ygap=gap,
                name=escape(chart.panels[panel]),
                hovertemplate=f"{escape(chart.axes[0])} %{{y}}<br>{escape(chart.axes[1])} %{{x}}<br>"
                f"%{{z:.4g}} {escape(chart.unit)}<extra></extra>",
            ),
            row=row, col=column,
        )  # fmt: skip
        if bare:
            if image is not None:
                tall, wide = chart.values.shape[1:]
                figure.add_layout_image(
                    source=data_uri(image.convert("L")), x=-0.5, y=-0.5, sizex=wide, sizey=tall, sizing="stretch",
                    layer="below", xanchor="left", yanchor="top", row=row, col=column,
                )  # fmt: skip
            axis = figure.get_subplot(row, column).xaxis.plotly_name.replace("axis", "")
            figure.update_yaxes(scaleanchor=axis, constrain="domain", visible=False, row=row, col=column)
            figure.update_xaxes(constrain="domain", visible=False, row=row, col=column)
        else:
            figure.update_xaxes(type="category", row=row, col=column)
            figure.update_yaxes(type="category", row=row, col=column)
            if panel + chart.grid[1] >= len(chart.panels):
                figure.update_xaxes(title=escape(chart.axes[1]), row=row, col=column)
            if column == 1:
                figure.update_yaxes(title=escape(chart.axes[0]), row=row, col=column)
    figure.update_yaxes(autorange="reversed")
    if chart.images:
        figure.update_layout(updatemenus=[_over_image()])


def _over_image() -> dict[str, Any]:
    buttons = [("over the image", OVER), ("values alone", 1)]
    return {
        "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": -0.02, "yanchor": "top",
        "buttons": [{"label": label, "method": "restyle", "args": [{"opacity": share}]} for label, share in buttons],
    }  # fmt: skip


def _bars(figure: go.Figure, chart: Chart) -> None:
    names = [escape(name) for name in chart.labels[1]]
    for panel, row, column in _cells(chart):
        values = chart.values[panel, 0]
        colours = [_rgb(MORE if value >= 0 else LESS) for value in values]
        if names[-1] == "sum":
            colours[-1] = INK
        figure.add_trace(
            go.Bar(
                x=values, y=names, orientation="h", marker_color=colours, showlegend=False,
                hovertemplate=f"%{{y}}: %{{x:.4g}} {escape(chart.unit)}<extra></extra>",
            ),
            row=row, col=column,
        )  # fmt: skip
        figure.update_xaxes(title=escape(chart.unit), row=row, col=column)
        figure.update_yaxes(title=escape(chart.axes[1]) if column == 1 else None, type="category", row=row, col=column)
    figure.update_yaxes(autorange="reversed", automargin=True)


def _curves(figure: go.Figure, chart: Chart) -> None:
    names, x = ([escape(name) for name in each] for each in chart.labels)
    for panel, row, column in _cells(chart):
        for line, name in enumerate(names):
            figure.add_trace(
                go.Scatter(
                    x=x, y=chart.values[panel, line], name=name or escape(chart.unit), mode="lines+markers",
                    line={"color": _rgb(still.LINES[line % len(still.LINES)])},
                    marker={"symbol": line, "size": 8}, legendgroup=name, showlegend=panel == 0 and len(names) > 1,
                    hovertemplate=f"{escape(chart.axes[1])} %{{x}}: %{{y:.4g}} {escape(chart.unit)}"
                    f"<extra>{name}</extra>",
                ),
                row=row, col=column,
            )  # fmt: skip
        for low, best, high in chart.spans:
            figure.add_vrect(low - 0.5, high - 0.5, fillcolor=INK, opacity=0.25, line_width=0, row=row, col=column)
            figure.add_vline(best - 0.5, line={"color": INK, "dash": "dash"}, row=row, col=column)
        figure.update_xaxes(title=escape(chart.axes[1]), type="category", row=row, col=column)
        figure.update_yaxes(title=escape(chart.unit) if column == 1 else None, row=row, col=column)


def _graph(figure: go.Figure, chart: Chart) -> None:
    shown = drawing(chart)
    for sign, colour in ((1, MORE), (-1, LESS)):
        edges = [edge for edge in shown.edges if (edge.weight >= 0) == (sign > 0)]
        for edge in edges:
            figure.add_trace(
                go.Scatter(
                    x=[edge.start[0], edge.end[0]], y=[edge.start[1], edge.end[1]], mode="lines", hoverinfo="skip",
                    line={"color": _rgb(colour), "width": edge.width}, opacity=0.75, showlegend=False,
                )
            )  # fmt: skip
        figure.add_trace(  # lines answer a pointer at their ends alone, so their middles are points
            go.Scatter(
                x=[(edge.start[0] + edge.end[0]) / 2 for edge in edges],
                y=[(edge.start[1] + edge.end[1]) / 2 for edge in edges], mode="markers",
                marker={"color": _rgb(colour), "size": 7}, name="positive" if sign > 0 else "negative",
                text=[f"{escape(edge.name)}: {edge.weight:+.4g} {escape(chart.unit)}" for edge in edges],
                hovertemplate="%{text}<extra></extra>",
            )
        )  # fmt: skip
    touched = {end for edge in shown.edges for end in (edge.name.partition("->")[0], _target(edge.name))}
    names = list(shown.nodes)
    figure.add_trace(
        go.Scatter(
            x=[shown.nodes[name][0] for name in names], y=[shown.nodes[name][1] for name in names], showlegend=False,
            mode="markers+text", text=[escape(name) for name in names], textposition="middle right", cliponaxis=False,
            marker={"size": 12, "color": INK, "opacity": [1 if name in touched else 0.35 for name in names]},
            hovertemplate="%{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_layout(legend={"orientation": "h", "y": 0, "x": 0})


def _target(edge: str) -> str:
    return edge.partition("->")[2].partition("<")[0]


def _rgb(colour: tuple[int, int, int]) -> str:
    return f"rgb{colour}"
