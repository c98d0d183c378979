"""Figures for the screen, drawn with Plotly: in a notebook, in a page, or as a still image for a paper."""

from __future__ import annotations

import functools
import json
import uuid
from html import escape
from pathlib import Path
from typing import Annotated, Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from pydantic import Field
from torch import Tensor

from prisma_core import InputError, Result, TokenLayout
from prisma_core.plugin import Count, checked, replacing
from prisma_view import still
from prisma_view.chart import Chart, Kind, chart_of
from prisma_view.drawing import FIT, draw, least_width

Dots = Annotated[int, Field(ge=20, le=2400)]
STILL = (".png", ".svg", ".pdf")


class Figure(go.Figure):
    """A Plotly figure that can save itself: as a page, or as a still image without Plotly."""

    @property
    def chart(self) -> Chart:
        """What is drawn, before it was given to Plotly."""
        return self._chart

    def __repr__(self) -> str:
        panels, rows, columns = self.chart.values.shape
        return f"Figure({self.chart.kind}, {panels} of {rows} by {columns}: {self.chart.title or self.chart.unit})"

    @checked
    def save(self, path: str | Path, *, dpi: Dots = 200) -> Path:
        """Write a page (``.html``) that needs no network, or a still image (``.png``, ``.svg``, ``.pdf``).

        Args:
            dpi: the resolution of a PNG.

        Raises:
            InputError: the path ends in something else.
        """
        path = Path(path)
        if path.suffix not in (".html", *STILL):
            raise InputError(f"Expected a path that ends in .html, {', '.join(STILL)}; got {path}.")
        with replacing(path) as fresh:
            if path.suffix == ".html":
                fresh.write_text(_page(self), encoding="utf-8")
            else:
                fresh.write_bytes(still.encoded(still.draw(self.chart), path.suffix[1:], dpi))
        return path

    @property
    def least_width(self) -> int:
        """The pixels below which the figure is no narrower, but scrolls."""
        return least_width(self.chart)

    def notebook_html(self) -> str:
        """Return the figure as a part of a page: a still image, which Plotly replaces where scripts may run.

        Plotly's library comes with the first figure of a Python process alone.
        """
        name = f"prisma-{uuid.uuid4().hex}"
        library = "" if _embedded() else f"<script>{get_plotlyjs()}</script>"
        source = still.png(self.chart)
        return (
            f'<figure style="margin:0"><img id="{name}-still" style="max-width:100%" src="{source}" '
            f'alt="{escape(self.chart.describe())}"><div style="overflow-x:auto"><div id="{name}" role="img" '
            f'style="min-width:{self.least_width}px" aria-label="{escape(self.chart.describe())}"></div></div>'
            f"{library}<script>(() => {{"
            f"const data = {figure_json(self)}; {FIT}"
            f'const draw = () => {{ const still = document.getElementById("{name}-still");'
            f'fit(data, document.getElementById("{name}").clientWidth);'
            f'Plotly.newPlot("{name}", data.data, data.layout, {{responsive: true, displaylogo: false}});'
            "still.remove(); };"
            "const wait = (times) => window.Plotly ? draw() : times && setTimeout(() => wait(times - 1), 200);"
            "wait(25); })()</script></figure>"
        )


@functools.cache
def _library_came() -> list[bool]:
    return []


def _embedded() -> bool:
    came = bool(_library_came())
    _library_came().append(True)
    return came


@checked
def plot(
    result: Result,
    *,
    kind: Kind | None = None,
    layout: TokenLayout | None = None,
    image: Any = None,
    panels: Count = 12,
) -> Figure:
    """Return a figure that fits a result: a heat map, patches over an image, bars, or curves.

    Axes ``row column``, and tokens that have a layout's names, are patches; two axes such as ``layer head`` are a heat
    map; a layer axis with a few others is curves; one axis is bars. Further axes are panels.

    >>> import torch
    >>> from prisma_core import Result
    >>> plot(Result(torch.randn(12, 16), ("layer", "head"), unit="logits")).chart.kind
    'heat'

    Args:
        result: what a technique returned, or a tensor with names for its axes.
        kind: ``heat``, ``patches``, ``bars`` or ``curves``, instead of the one that fits.
        layout: where the patches are, for a token axis without labels: ``model.layout``.
        image: what the model sees, drawn under the patches: a preprocessed tensor, or
            ``model.preprocess.seen(...)``; a path whose image is square works too.
        panels: the most panels.

    Raises:
        InputError: there is nothing to draw, or no axis that the kind needs.
    """
    chart = chart_of(result, kind=kind, layout=layout, image=image, panels=panels)
    figure = draw(chart, Figure())
    figure._chart = chart
    return figure


@checked
def patches(values: Tensor, layout: TokenLayout, image: Any = None, *, unit: str = "", title: str = "") -> Figure:
    """Return values of patches over an image: ``[... pos]``, of all tokens or of patches alone.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> _, cache = model.run_with_cache(torch.zeros(1, 3, 96, 96), names=("resid_post", -1))
    >>> patches(cache["resid_post", -1][0].norm(dim=-1), model.layout, unit="norm")
    Figure(patches, 1 of 12 by 12: values)

    Args:
        values: the last axis is tokens; those before it are panels.
        layout: ``model.layout``. Frames of a video are panels; the class token and registers stand in the caption.
        image: see ``plot``.
        unit: what one number is.

    Raises:
        InputError: the last axis is neither all tokens nor the patches.
    """
    return plot(_tokens(values, layout, unit, title), kind="patches", image=image)


@checked
def attention(
    pattern: Tensor, layout: TokenLayout, image: Any = None, *, query: int | str | None = None, unit: str = ""
) -> Figure:
    """Return what a token attends to, over the image, for each head: ``[... query_pos key_pos]``.

    ``attention_page`` shows every layer, head and token at once.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> _, cache = model.run_with_cache(torch.zeros(1, 3, 96, 96), names=("pattern", -1))
    >>> attention(cache["pattern", -1][0], model.layout, query="r5c5")
    Figure(patches, 4 of 12 by 12: attention of r5c5)

    Args:
        pattern: attention, or scores; the axes before the last two are panels.
        layout, image: see ``patches``.
        query: the token that attends, by name (``cls``, ``r3c5``) or index; by default the first token.

    Raises:
        InputError: the pattern is not over all tokens of the layout.
        UnknownName: no such token.
    """
    n = layout.n_tokens
    if pattern.ndim < 2 or tuple(pattern.shape[-2:]) != (n, n):
        raise InputError(f"Expected a pattern [... {n} {n}] over all tokens of the layout, got {list(pattern.shape)}.")
    names = layout.token_names()
    index = Result(pattern[..., 0].reshape(-1, n)[0], ("token",), {"token": tuple(names)}).index(
        "token", 0 if query is None else query
    )
    title = f"attention of {names[index]}"
    return patches(pattern.select(-2, index), layout, image, unit=unit or "share of attention", title=title)


def _tokens(values: Tensor, layout: TokenLayout, unit: str, title: str) -> Result:
    names = layout.token_names()
    if values.ndim < 1 or values.shape[-1] not in (layout.n_tokens, layout.n_patches):
        raise InputError(
            f"Expected {layout.n_tokens} tokens or {layout.n_patches} patches on the last axis, got "
            f"{list(values.shape)}. Was the cache taken with a token slice?"
        )
    names = names[layout.n_tokens - values.shape[-1] :]
    outer = [f"axis{i}" for i in range(values.ndim - 1)]
    if outer and tuple(values.shape[:-1]) != (1,) * len(outer):
        outer[-1] = "head" if values.ndim == 2 else outer[-1]
    return Result(values, (*outer, "pos"), {"pos": tuple(names)}, technique=title, unit=unit)


def figure_json(figure: Figure) -> str:
    """Return a figure as JSON that can stand in a script of a page."""
    return json.dumps(json.loads(figure.to_json()), separators=(",", ":")).replace("<", "\\u003c")


def _page(figure: Figure) -> str:
    """Return a page with one figure, and a table of what is drawn for those who read it otherwise."""
    chart = figure.chart
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{escape(chart.title)} · Prisma</title>
<link rel="icon" href="data:,">
<style>body {{ font-family: system-ui; margin: 1rem; background: Canvas; color: CanvasText; }}
p {{ overflow-wrap: anywhere; }} .wide {{ overflow-x: auto; }}
#figure {{ min-width: {figure.least_width}px; }}
#figure text:not(.hoverlayer *, .updatemenu-container *) {{ fill: CanvasText !important; }}
#figure .updatemenu-item-rect {{ fill: Canvas !important; }}
#figure .updatemenu-container text {{ fill: CanvasText !important; }}
</style></head>
<body><main><div class="wide"><div id="figure" role="img" aria-label="{escape(chart.describe())}"></div></div>
<p>{escape(chart.describe())}</p></main>
<script>{get_plotlyjs()}</script><script>
const figure = {figure_json(figure)};
{FIT}
fit(figure, document.getElementById("figure").clientWidth);
Plotly.newPlot("figure", figure.data, figure.layout, {{responsive: true, displaylogo: false}})
  .then(() => {{ document.documentElement.dataset.ready = "yes"; }});
</script></body></html>
"""
