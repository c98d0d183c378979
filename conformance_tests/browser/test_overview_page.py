"""The overview of any model in a real browser: every figure drawn, nothing wider than the window, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from browsing import assert_named, assert_no_sideways, assert_quiet, js, show
from PIL import Image

import prisma_core as prisma

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

WORDS = ["a red circle", "a <i>blue</i> star"]


def classifier() -> tuple[Any, Any]:
    return models.build(registers=2), torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def autoencoder() -> tuple[Any, Any]:
    return prisma.load("toy:mae-scenes"), Image.new("RGB", (48, 48), "teal")


def video() -> tuple[Any, Any]:
    return prisma.load("toy:motion"), [Image.new("L", (32, 32), shade) for shade in range(0, 240, 30)]


def dual() -> tuple[Any, Any]:
    return prisma.load("toy:clip-scenes"), Image.new("RGB", (64, 64), "teal")


FIGURES = {classifier: (5, 2), autoencoder: (4, 5 + 8 + 2), video: (5, 2), dual: (6, 3)}


OVERLAPS = """const found = [];
for (const figure of document.querySelectorAll('.js-plotly-plot')) {
  const titles = [...figure.querySelectorAll('.annotation-text')];
  for (const one of titles) for (const two of titles) {
    const [a, b] = [one, two].map((e) => e.getBoundingClientRect());
    if (a.left < b.left && a.right > b.left && Math.abs(a.top - b.top) < 4) found.push(one.textContent);
  }
}
return found"""
"""Titles of panels that lie over the one beside them."""


@pytest.fixture(scope="module", params=FIGURES, ids=lambda made: made.__name__)
def page(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, tuple[int, int]]:
    import prisma_view

    model, image = request.param()
    words = WORDS if request.param is dual else ()
    page = prisma_view.overview(model, image, words, title="<b>mine</b>").save(
        folder / f"{request.param.__name__}.html"
    )
    return page, FIGURES[request.param]


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_figure_is_drawn_and_fits(browser: Chrome, page: Any, width: int, theme: str) -> None:
    path, drawn = page
    show(browser, path, width, 844)
    js(browser, "document.documentElement.dataset.theme = arguments[0]", theme)
    figures = js(browser, "return document.querySelectorAll('.figure > .js-plotly-plot .main-svg').length > 0")
    assert figures
    count = js(
        browser, "return ['.figure > .js-plotly-plot', '.row img'].map((s) => document.querySelectorAll(s).length)"
    )
    assert tuple(count) == drawn
    assert js(browser, "return document.querySelector('h1').textContent") == "<b>mine</b>"
    assert js(browser, "return document.querySelectorAll('main b, main i').length") == len(
        js(browser, "return [...document.querySelectorAll('.left-out b')].map((e) => e.textContent)")
    )
    assert js(browser, OVERLAPS) == []
    assert_no_sideways(browser)
    assert_named(browser)
    assert_quiet(browser, path)


def test_the_theme_is_switched(browser: Chrome, page: Any) -> None:
    show(browser, page[0], 800, 844)
    before = js(browser, "return getComputedStyle(document.body).backgroundColor")
    js(browser, "document.getElementById('theme').click()")
    assert js(browser, "return getComputedStyle(document.body).backgroundColor") != before
