"""Figures: which chart fits, what it holds, what is drawn on screen and on paper, and that labels stay text."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import prisma_view
import pytest
import torch
from PIL import Image
from plotly.offline import get_plotlyjs
from prisma_patch import Circuit, change_points
from prisma_patch.graph import Shape
from prisma_view.graphs import drawing
from prisma_view.still import draw as draw_still
from prisma_view.table import GRAPH

from prisma_core import InputError, Result, TokenLayout, UnknownName

LAYOUT = TokenLayout(cls=1, registers=1, rows=3, columns=4)
VIDEO = TokenLayout(cls=1, frames=2, rows=3, columns=4, order="row column frame")


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)), dtype=torch.float64)


def drawn(figure: Any) -> list[np.ndarray]:
    return [np.array(trace.z, dtype=float) for trace in figure.data]


CASES = [
    (("layer", "head"), (3, 4), "heat", (1, 3, 4)),
    (("layer", "head", "batch"), (3, 4, 1), "heat", (1, 3, 4)),
    (("kind", "layer", "head"), (5, 3, 4), "heat", (5, 3, 4)),
    (("head", "batch", "layer"), (4, 2, 3), "heat", (2, 3, 4)),
    (("batch", "row", "column"), (2, 3, 4), "patches", (2, 3, 4)),
    (("place", "task"), (6, 2), "curves", (1, 2, 6)),
    (("layer",), (6,), "curves", (1, 1, 6)),
    (("component",), (7,), "bars", (1, 1, 7)),
    (("class",), (90,), "bars", (1, 1, 41)),
    ((), (), "bars", (1, 1, 1)),
]


@pytest.mark.parametrize(("axes", "shape", "kind", "size"), CASES)
def test_the_chart_fits_the_axes(axes: tuple[str, ...], shape: tuple[int, ...], kind: str, size: Any) -> None:
    chart = Result(values(*shape), axes).plot().chart
    assert chart.kind == kind
    assert chart.values.shape == size


@pytest.mark.parametrize("shape", [(1, 4, 1), (3, 1, 1), (1, 1, 1)])
def test_a_heat_map_that_is_asked_for_may_have_one_row_or_column(shape: tuple[int, ...]) -> None:
    result = Result(values(*shape), ("layer", "head", "batch"))
    np.testing.assert_array_equal(result.plot(kind="heat").chart.values[0], result.values[..., 0])


def test_each_value_is_drawn_in_its_place() -> None:
    result = Result(values(4, 2, 3), ("head", "batch", "layer"), {"layer": ("a", "b", "c")}, unit="logits")
    figure = result.plot()
    for batch, z in enumerate(drawn(figure)):
        np.testing.assert_array_equal(z, result.values[:, batch].T.numpy())
    assert figure.data[0].y == ("a", "b", "c")
    assert figure.layout.coloraxis.colorbar.title.text == "logits"
    most = float(result.values.abs().max())
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-most, most)


@pytest.mark.parametrize("layout", [LAYOUT, VIDEO])
def test_tokens_become_patches_where_the_layout_has_them(layout: TokenLayout) -> None:
    x = values(layout.n_tokens)
    figure = prisma_view.patches(x, layout)
    expected = layout.grid(x, axis=0).reshape(-1, layout.rows, layout.columns).numpy()
    np.testing.assert_array_equal(np.stack(drawn(figure)), expected)
    assert f"cls: {x[0]:.3g}" in figure.layout.title.subtitle.text
    alone = prisma_view.patches(x[layout.n_prefix :], layout)
    np.testing.assert_array_equal(np.stack(drawn(alone)), expected)


def test_attention_is_the_row_of_the_query() -> None:
    pattern = values(5, LAYOUT.n_tokens, LAYOUT.n_tokens).softmax(-1)
    for query, index in (("r1c2", 2 + 4 + 2), (3, 3), (None, 0)):
        figure = prisma_view.attention(pattern, LAYOUT, query=query)
        expected = LAYOUT.grid(pattern[:, index], axis=1).numpy()
        np.testing.assert_array_equal(np.stack(drawn(figure)), expected)
    with pytest.raises(UnknownName, match="r1c2"):
        prisma_view.attention(pattern, LAYOUT, query="r1c9")
    with pytest.raises(InputError, match="14 14"):
        prisma_view.attention(pattern[..., 1:], LAYOUT)
    with pytest.raises(InputError, match="14 tokens or 12 patches"):
        prisma_view.patches(pattern[0, 0, 3:], LAYOUT)


def test_bars_with_a_total_end_in_their_sum() -> None:
    x, constant = values(50), torch.tensor(0.75, dtype=torch.float64)
    chart = Result(x, ("component",), total="the logit", tensors={"constant": constant}).plot().chart
    assert chart.labels[1][-1] == "sum"
    assert chart.values[0, 0, -1] == pytest.approx(float(x.sum() + 0.75), abs=1e-12)
    assert chart.values[0, 0, :-1].sum() == pytest.approx(chart.values[0, 0, -1], abs=1e-12)
    assert "50" not in chart.labels[1]
    assert any("others" in name for name in chart.labels[1])


def test_a_caption_names_the_sum_and_no_attribute_of_the_result() -> None:
    x, constant = values(3), torch.tensor(0.75, dtype=torch.float64)
    total = "the logit, with tensors['constant']"
    result = Result(x, ("component",), total=total, tensors={"constant": constant}, technique="attribute")
    assert result.plot().chart.notes == ("The last bar is the sum: the logit.",)


def test_an_axis_of_the_only_image_is_in_no_title() -> None:
    one = Result(values(1, 3, 4), ("batch", "layer", "head"), technique="patch")
    assert one.plot().chart.title == "patch"
    third = Result(values(1, 3, 4), ("batch", "layer", "head"), {"batch": ("the third",)}, technique="patch")
    assert third.plot().chart.title == "patch, batch the third"


def test_a_place_is_named_by_its_row_and_column() -> None:
    grid = torch.zeros(3, 4)
    grid[2, 1] = 5
    assert "Largest: row 2 column 1, 5 norm" in Result(grid, ("row", "column"), unit="norm").plot().chart.describe()


def test_an_image_lies_under_the_patches() -> None:
    image = values(1, 3, 24, 32)
    figure = prisma_view.patches(values(LAYOUT.n_patches), LAYOUT, image)
    (under,) = figure.layout.images
    assert (under.sizex, under.sizey, under.x, under.y) == (4, 3, -0.5, -0.5)
    assert figure.chart.image.size == (32, 24)
    assert np.asarray(figure.chart.image).min() == 0
    assert np.asarray(figure.chart.image).max() == 255
    with pytest.raises(InputError, match=r"1 or 3 channels"):
        prisma_view.patches(values(LAYOUT.n_patches), LAYOUT, values(5, 24, 32))


def test_labels_are_text_never_markup(tmp_path: Path) -> None:
    hostile = ("<img src=x onerror=alert(1)>", "</script><b>bold</b>")
    result = Result(values(2, 12), ("class", "neuron"), {"class": hostile}, technique="<i>x</i>", unit="<u>")
    for kind in ("heat", "bars", "curves"):
        figure = result.plot(kind=kind)
        for text in (figure.save(tmp_path / "page.html").read_text("utf-8"), figure.notebook_html()):
            own = text.replace(get_plotlyjs(), "")
            assert not re.search(r"<(img src=x|b>|i>|u>)", own)
            assert own.count("</script>") == own.count("<script>")


@pytest.mark.parametrize(("axes", "shape", "kind", "size"), CASES)
def test_paper_shows_what_the_screen_shows(
    axes: tuple[str, ...], shape: tuple[int, ...], kind: str, size: Any, tmp_path: Path
) -> None:
    result = Result(values(*shape), axes, technique="$t_x", unit="nats")
    still = draw_still(result.plot().chart)
    panel = still.axes[0]
    if kind == "curves":
        shown = np.stack([line.get_ydata() for line in panel.lines])
    elif kind == "bars":
        shown = np.array([[bar.get_width() for bar in panel.patches]])
    else:
        shown = panel.images[-1].get_array()
    np.testing.assert_allclose(shown, result.plot().chart.values[0])
    texts = [text.get_text() for text in still.findobj(lambda x: hasattr(x, "get_text"))]
    assert "nats" in texts
    path = result.plot().save(tmp_path / "deep" / "figure.png", dpi=50)
    assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 5


def test_titles_of_panels_are_as_wide_as_panels_and_begin_with_what_differs() -> None:
    names = tuple(f"n0{i} goldfinch, Carduelis carduelis, a bird of the family of finches" for i in range(4))
    axes = ("layer", "class", "row", "column")
    chart = prisma_view.plot(Result(torch.rand(1, 4, 3, 4), axes, {"class": names}, technique="lens")).chart
    assert chart.title == "lens, layer 0"
    chart = prisma_view.plot(Result(torch.rand(2, 4, 3, 4), axes, {"class": names}), panels=4).chart
    assert chart.title == "values, layer 0"  # of 8 panels, whose others are of layer 1
    assert chart.panels == tuple(f"class {name}" for name in names)
    chart = prisma_view.plot(Result(torch.rand(2, 4, 3, 4), axes, {"class": names})).chart
    lines = chart.titles()
    assert [each[0] for each in lines] == ["layer 0"] * 4 + ["layer 1"] * 4
    assert [each[1].split()[1] for each in lines] == [f"n0{i}" for i in range(4)] * 2
    assert max(len(line) for each in lines for line in each) <= 92 // 3
    drawn_titles = [each.text for each in prisma_view.plot(Result(torch.rand(2, 4, 3, 4), axes)).layout.annotations]
    assert drawn_titles[0] == "layer 0<br>class 0"


def test_frames_lie_under_the_panels_of_their_frames() -> None:
    video = torch.zeros(1, 4, 3, 6, 8)
    video[0, 2, :, :3] = 1  # the upper half of the first of two images that the second frame of patches takes
    result = Result(torch.rand(2, 25), ("layer", "pos"), {"pos": tuple(VIDEO.token_names())})
    figure = result.plot(image=video)
    chart = figure.chart
    assert chart.panels == ("layer 0 · frame 0", "layer 0 · frame 1", "layer 1 · frame 0", "layer 1 · frame 1")
    means = [float(np.asarray(chart.under(panel)).mean()) for panel in range(4)]
    assert means == pytest.approx([0, 127.5, 0, 127.5])
    sources = [each.source for each in figure.layout.images]
    assert [sources.index(each) for each in sources] == [0, 1, 0, 1]
    axes = draw_still(chart).axes[:4]
    assert [float(axis.images[0].get_array().mean()) for axis in axes] == pytest.approx(means, abs=1)


def test_an_image_that_is_not_drawn_is_named_in_the_caption() -> None:
    square = Result(
        torch.rand(25, 25), ("pos", "source"), {each: tuple(VIDEO.token_names()) for each in ("pos", "source")}
    )
    chart = square.plot(image=torch.rand(3, 6, 8)).chart
    assert chart.images == ()
    assert any("image is not drawn" in note and "sel()" in note for note in chart.notes)


def test_a_figure_prints_what_it_is_and_not_its_data() -> None:
    figure = prisma_view.plot(Result(torch.rand(2, 3), ("layer", "head"), technique="scores"))
    assert repr(figure) == "Figure(heat, 1 of 2 by 3: scores)"


@pytest.mark.parametrize(("name", "head"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.png", b"\x89PNG")])
def test_figures_are_saved_in_forms_for_papers(name: str, head: bytes, tmp_path: Path) -> None:
    assert Result(values(3, 4), ("layer", "head")).plot().save(tmp_path / name).read_bytes().startswith(head)
    with pytest.raises(InputError, match=r"\.html.*\.gif"):
        Result(values(3, 4), ("layer", "head")).plot().save(tmp_path / "a.gif")


@pytest.mark.parametrize(
    ("axes", "shape", "options", "fact"),
    [
        (("layer", "head"), (0, 4), {}, "nothing to draw"),
        (("layer", "head"), (2, 4), {"kind": "pie"}, "'heat', 'patches'"),
        (("layer", "head"), (2, 4), {"kind": "patches"}, "layout="),
        (("layer",), (2,), {"kind": "heat"}, "two axes"),
        ((), (), {"kind": "curves"}, "bars"),
    ],
)
def test_what_cannot_be_drawn_is_said(axes: Any, shape: Any, options: dict[str, Any], fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        Result(torch.zeros(shape), axes).plot(**options)


def test_a_graph_has_the_edges_of_the_circuit(tmp_path: Path) -> None:
    shape = Shape(n_layers=2, n_heads=3, d_model=4, parallel=False, mlps=(0,))
    whole = Circuit(shape, values(*shape.real().shape) * shape.real(), shape.real())
    edges = {"input->a0.h1<v>": 2.0, "a0.h1->m0": -1.0, "m0->a1.h2<q>": 0.5, "a1.h2->logits": -4.0}
    circuit = whole.only([*edges])
    for edge, weight in edges.items():
        circuit.scores[circuit.index(edge)] = weight
    figure = circuit.plot()
    assert figure.chart.kind == "graph"
    shown = drawing(figure.chart)
    assert {edge.name: edge.weight for edge in shown.edges} == edges
    assert [edge.name for edge in shown.edges][-1] == "a1.h2->logits"  # the strongest lies on top
    assert figure.chart.describe() == "circuit: 4 edges. Largest: a1.h2->logits, -4 score."
    heights = [shown.nodes[name][1] for name in ("input", "a0.h0", "a0.h1", "m0", "a1.h2", "logits")]
    assert heights == [0, 1, 1, 2, 3, 4]
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert sorted(line.line.width for line in lines)[-1] == pytest.approx(6)
    words = {text: trace.name for trace in figure.data if trace.mode == "markers" for text in trace.text}
    assert words[escape("a1.h2->logits: -4 score")] == "negative"
    assert words[escape("input->a0.h1<v>: +2 score")] == "positive"
    still = draw_still(figure.chart).axes[0]
    assert len(still.lines) == 4
    assert {text.get_text() for text in still.texts} == {*shape.sources, "logits"}
    assert "<figure" in circuit._repr_html_()
    many = Result(values(40, 40), ("source", "target"), {a: tuple(f"m{i}" for i in range(40)) for a in GRAPH}).plot()
    assert "120 of 1600 edges" in many.layout.title.subtitle.text
    assert len(drawing(many.chart).edges) == 120
    with pytest.raises(InputError, match="'cat' is no node"):
        Result(values(2, 2), GRAPH, {"source": ("input", "cat"), "target": ("m0", "logits")}).plot()


def test_changes_are_drawn_with_their_intervals() -> None:
    x = torch.cat([torch.ones(12), torch.zeros(8)]).double() + 0.05 * values(20)
    series = Result(x, ("checkpoint",), {"checkpoint": tuple(str(100 * at) for at in range(20))}, unit="loss")
    changes = change_points(series, 1)
    figure = changes.plot()
    assert figure.chart.spans == (tuple(changes.values[0].tolist()),)
    np.testing.assert_array_equal(figure.chart.values[0], np.stack([x, changes.tensors["fitted"]]))
    assert [trace.name for trace in figure.data] == ["series", "pieces"]
    assert figure.layout.yaxis.title.text == "loss"
    low, best, high = changes.values[0].tolist()
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [
        (low - 0.5, high - 0.5),
        (best - 0.5, best - 0.5),
    ]
    assert "Changes at 1200" in figure.layout.title.subtitle.text
    still = draw_still(figure.chart).axes[0]
    assert still.lines[-1].get_xdata()[0] == best - 0.5
    assert "No change." in change_points(0 * x + 1, 0).plot().layout.title.subtitle.text


def test_a_still_image_leaves_out_what_its_font_lacks_and_breaks_a_long_unit() -> None:
    result = Result(values(3, 2), ("layer", "class"), {"layer": ("\U0001f41e ladybird", "a $x$", "été")})
    result = dataclasses.replace(result, unit="the share of the way from the one image to the other, by a probe")
    figure = draw_still(result.plot(kind="curves").chart)
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["ladybird", r"a \$x\$", "été"]
    lines = axis.get_ylabel().splitlines()
    assert " ".join(lines) == result.unit
    assert max(map(len, lines)) <= 36


def test_panels_that_are_left_out_are_counted() -> None:
    figure = Result(values(30, 3, 4), ("class", "layer", "head")).plot(panels=5)
    assert len(figure.data) == 5
    assert "5 of 30 panels" in figure.layout.title.subtitle.text


def test_a_notebook_gets_the_library_once_and_an_image_for_where_no_script_runs() -> None:
    code = """
import torch
from prisma_core import Result
result = Result(torch.randn(3, 4), ("layer", "head"), technique="patch")
first, second = result._repr_html_(), result._repr_html_()
print(len(first) > 3_000_000, len(second) < 200_000)
print("data:image/png" in second, "<table>" in second, 'alt="patch' in second)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 5


def test_without_plotly_a_result_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    for name in [name for name in sys.modules if name.startswith("prisma_view.figures")]:
        monkeypatch.delitem(sys.modules, name)
    text = Result(values(3, 4), ("layer", "head"))._repr_html_()
    assert text.startswith("<table>")
