"""The panels of a report as still images for papers, slides and posts, drawn with matplotlib."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch

from prisma_core import Result
from prisma_core.plugin import checked, replacing
from prisma_view.chart import chart_of
from prisma_view.colours import QUIET, REST, Colour
from prisma_view.findings import Report, head_values
from prisma_view.glyphs import glyph
from prisma_view.page import class_colours
from prisma_view.still import encoded, panel_of, plain, scale
from prisma_view.words import component_name, rest_name, stage_name

MOST_STAGES = 4
CELL = 48
"""Pixels of a patch in the layer of emoji above an image."""
DPI = 160


@checked
def write_images(
    found: Report, folder: str | Path, *, trained: bool = True, form: Literal["png", "svg", "pdf"] = "png"
) -> list[Path]:
    """Write ``lens``, ``attention``, ``attribution`` and ``patching``, those that apply, and return their paths.

    >>> from prisma_view import report
    >>> import tempfile
    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> found = report(model, sample_scene(0).image, sample_scene(3).image)
    >>> [path.name for path in write_images(found, tempfile.mkdtemp(), form="svg")]
    ['lens.svg', 'attention.svg', 'attribution.svg', 'patching.svg']

    Args:
        trained: False states on each that the weights are random.
        form: of the files.
    """
    paths: list[Path] = []
    for name, figure in report_images(found, trained=trained).items():
        paths.append(Path(folder) / f"{name}.{form}")
        with replacing(paths[-1]) as fresh:
            fresh.write_bytes(encoded(figure, form, DPI))
    return paths


def report_images(found: Report, *, trained: bool = True) -> dict[str, Figure]:
    """Return the panels of a report that apply, by name, as matplotlib figures."""
    drawn: dict[str, Callable[[Report], Figure]] = {
        **({"lens": lens} if found.lens is not None else {}),
        "attention": attention,
        **({"attribution": attribution} if found.layers is not None else {}),
        **({"patching": patching} if found.patching is not None else {}),
    }
    figures = {name: draw(found) for name, draw in drawn.items()}
    for figure in figures.values():
        if not trained:
            figure.supxlabel("Random weights: nothing here was learned.", color="#b03e08", weight="bold")
    return figures


def lens(found: Report) -> Figure:
    """Draw the image and the emoji logit lens at some layers, the last one among them."""
    assert found.lens is not None
    n = len(found.lens.stages)
    count = min(MOST_STAGES, n)
    stages = [round(1 + at * (n - 2) / max(1, count - 1)) for at in range(count)] if n > count else list(range(n))
    colours = class_colours(found)
    figure, axes = _figure("What each patch says, layer by layer", 1, len(stages) + 1, (2.4 * (len(stages) + 1), 3.6))
    seen: Counter[int] = Counter()
    for axis, stage in zip(axes, [None, *stages], strict=True):
        axis.imshow(np.asarray(found.image))
        axis.set_title("the image" if stage is None else stage_name(found.lens.stages[stage]), fontsize=9)
        if stage is not None:
            seen.update(_lens_panel(found, axis, stage, colours))
    ordered = [index for index, _ in seen.most_common()]
    named = [index for index in ordered if colours[index] != REST]
    handles = [Patch(color=_share(colours[index]), label=plain(found.symbol(index).name)) for index in named]
    if others := len(ordered) - len(named):
        handles.append(Patch(color=_share(REST), label=f"{others} other class{'es' * (others > 1)}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(axes), frameon=False, fontsize=8)
    return figure


def _lens_panel(found: Report, axis: Any, stage: int, colours: dict[int, Colour]) -> list[int]:
    """Draw one layer of the lens over the image: a colour and an emoji for each patch. Return the patches' classes."""
    assert found.lens is not None
    layout = found.layout
    logits = found.lens.logits[stage, layout.slice("patches")].float()
    classes = logits.argmax(-1).view(layout.rows, layout.columns).tolist()
    chances = logits.softmax(-1).amax(-1).view(layout.rows, layout.columns).tolist()
    over = (-0.5, found.image.width - 0.5, found.image.height - 0.5, -0.5)
    wash = [[(*_share(colours[index]), 0.42 if colours[index] == QUIET else 0.66) for index in row] for row in classes]
    emoji = np.zeros((layout.rows * CELL, layout.columns * CELL, 4))
    size = round(0.66 * CELL)
    for row, line in enumerate(classes):
        for column, index in enumerate(line):
            drawn = glyph(found.symbol(index).emoji, size)
            if drawn is not None:
                top, left = (at * CELL + (CELL - size) // 2 for at in (row, column))
                faint = (0.4 + 0.6 * chances[row][column]) * (0.45 if colours[index] == QUIET else 1)
                emoji[top : top + size, left : left + size] = np.asarray(drawn) / 255 * [1, 1, 1, faint]
    axis.imshow(np.array(wash), extent=over, interpolation="nearest")
    axis.imshow(emoji, extent=over)
    return [index for row in classes for index in row]


def attention(found: Report) -> Figure:
    """Draw where every head reads from for the class token, or for the middle patch where there is none."""
    layout = found.layout
    layers, heads = found.patterns.shape[:2]
    query = 0 if layout.cls else layout.n_prefix + layout.n_patches // 2 + layout.columns // 2
    weights = found.patterns[:, :, query, layout.slice("patches")].float().cpu()
    weights = weights / weights.amax(-1, keepdim=True).clamp_min(1e-9)
    maps = weights.view(layers, heads, layout.rows, layout.columns).numpy()
    tall, wide = layout.rows + 1, layout.columns + 1  # with a gap
    sheet = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    sheet = sheet.swapaxes(1, 2).reshape(layers * tall, heads * wide)
    who = "the class token" if layout.cls else "the patch in the middle"
    width = min(10.0, 1.0 + 1.4 * heads)
    size = (max(4.5, width), 1.1 + layers * (width - 1) / heads * tall / wide)
    figure, (axis,) = _figure(f"Where every head looks, seen from {who}", 1, 1, size)
    axis.imshow(sheet, cmap="viridis", interpolation="nearest")
    axis.set_axis_on()
    axis.set(xlabel="head", ylabel="block")
    axis.set_xticks([(at + 0.5) * wide - 1 for at in range(heads)], [str(at) for at in range(heads)])
    axis.set_yticks([(at + 0.5) * tall - 1 for at in range(layers)], [str(at) for at in range(layers)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def attribution(found: Report) -> Figure:
    """Draw what each layer and each head wrote towards the best guess."""
    assert found.layers is not None
    at = found.shown.index(found.best)
    names = (*map(component_name, found.layers.names("component")), rest_name(found))
    values = [*found.layers.values[:, at].tolist(), float(found.layers.tensors["constant"][0, at])]
    table = found.layers.values.new_tensor(values)
    bars = chart_of(Result(table, ("component",), {"component": names}, unit="logits", total="the logit"))
    shape = (5, max(2.6, 0.24 * len(names)))
    columns = 1 if found.heads is None else 2
    title = f"Who wrote “{found.symbol(found.best).name}”? Blue speaks against it"
    figure, axes = _figure(title, 1, columns, (shape[0] * columns, shape[1] + 0.8))
    axes[0].set_axis_on()
    panel_of(bars, axes[0])
    if found.heads is not None:
        heads = Result(head_values(found)[..., at], ("layer", "head"), unit="logits")
        _heads(figure, axes[1], heads)
    return figure


def patching(found: Report) -> Figure:
    """Draw what each head's output from the second image does to the lead of the first image's class."""
    assert found.patching is not None
    where, change = next(iter(found.patching.change.items()))
    kept, put = found.symbol(found.patching.kept), found.symbol(found.patching.put)
    words = f"One head from another image: what it does to the lead of {kept.name} over {put.name}"
    figure, axes = _figure(f"{words}, {found.patching.before:+.1f}", 1, 3, (9.5, 3.4))
    for axis, panel, name in zip(axes, (found.image, found.other), ("first", "second"), strict=False):
        axis.imshow(np.asarray(panel))
        axis.set_title(name, fontsize=9)
    _heads(figure, axes[2], Result(change, ("layer", "head"), unit="change of the lead"))
    for layer, line in enumerate(found.patching.guess[where].tolist()):
        for head, index in enumerate(line):
            drawn = glyph(found.symbol(index).emoji, 40) if index != found.best else None
            if drawn is not None:  # a new answer
                mark = AnnotationBbox(OffsetImage(np.asarray(drawn), zoom=0.35), (head, layer), frameon=False)
                axes[2].add_artist(mark)
    return figure


def _heads(figure: Figure, axis: Any, values: Result) -> None:
    chart = chart_of(values, kind="heat")
    axis.set_axis_on()
    panel_of(chart, axis)
    scale(chart, figure, axis)


def _figure(title: str, rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """Return a figure with a title, and its axes without frames."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle(plain(title), fontsize=11)
    return figure, axes


def _share(colour: Colour) -> tuple[float, float, float]:
    red, green, blue = (each / 255 for each in colour)
    return red, green, blue
