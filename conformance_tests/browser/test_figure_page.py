"""Figures in a real browser: what their buttons do, texts apart and inside, the height on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import models
import pytest
import torch
from browsing import assert_no_sideways, assert_quiet, js, show

from prisma_core import Result

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BUTTONS = {"download plot as a png", "zoom", "pan", "reset axes"}  # releases of plotly differ in capitals
LAYOUT = models.build(registers=2).layout

APART = """const boxes = [...document.querySelectorAll('.gtitle, .gtitle-subtitle, .modebar-group, .nsewdrag')];
const found = [];
for (const one of boxes) for (const two of boxes) {
  const [a, b] = [one, two].map((e) => e.getBoundingClientRect());
  if (one === two || one.contains(two) || two.contains(one) || !a.width || !b.width) continue;
  if (a.left < b.right - 2 && b.left < a.right - 2 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
    found.push([one.getAttribute('class'), two.getAttribute('class')]);
}
return found"""
OUTSIDE = """const { right, left } = document.querySelector('#figure').getBoundingClientRect();
return [...document.querySelectorAll('#figure .textpoint text')].map((e) => [e.textContent, e.getBoundingClientRect()])
  .filter(([, box]) => box.right > right || box.left < left).map(([name]) => name)"""


def bars() -> Result:
    values = torch.linspace(-1, 1, 6)
    return Result(
        values, ("component",), technique="attribute", total="the logit, with tensors['constant']", unit="logits",
        tensors={"constant": torch.tensor(1.0)}, baseline="an image that the model has never seen before in its life",
    )  # fmt: skip


def tokens() -> Result:
    names = tuple(LAYOUT.token_names())
    return Result(torch.arange(float(len(names))), ("pos",), {"pos": names}, technique="norms", unit="norm")


def graph() -> Result:
    nodes = [f"a0.h{head}" for head in range(4)]
    labels = {"source": ("input", *nodes), "target": (*(f"{node}<q>" for node in nodes), "logits")}
    return Result(torch.randn(5, 5), ("source", "target"), labels, technique="edge scores", unit="change of the metric")


@pytest.fixture(scope="module", params=[bars, tokens, graph], ids=lambda made: made.__name__)
def page(request: pytest.FixtureRequest, folder: Path) -> Path:
    return request.param().plot().save(folder / f"{request.param.__name__}-figure.html")


def test_no_button_of_a_figure_sends_it_anywhere(browser: Chrome, page: Path) -> None:
    show(browser, page, 1200, 844)
    titles = js(browser, "return [...document.querySelectorAll('.modebar-btn')].map((e) => e.dataset.title)")
    assert {title.lower() for title in titles} == BUTTONS
    assert_quiet(browser, page)


@pytest.mark.parametrize("width", [390, 1200])
def test_texts_of_a_figure_lie_apart_and_inside(browser: Chrome, page: Path, width: int) -> None:
    show(browser, page, width, 844)
    assert js(browser, APART) == []
    assert js(browser, OUTSIDE) == []
    assert_no_sideways(browser)


def test_patches_are_no_taller_on_a_phone_than_they_need(browser: Chrome, folder: Path) -> None:
    show(browser, tokens().plot().save(folder / "phone.html"), 390, 844)
    drawn, whole = (
        js(browser, f"return document.querySelector('#figure {each}').getBoundingClientRect().height")
        for each in (".heatmaplayer", ".main-svg")
    )
    assert drawn > 0.4 * whole
