"""A gallery in a real browser, from disk: search, order, keys, lit patches, ten thousand units, two widths, dark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from browsing import assert_named, assert_no_sideways, assert_quiet, js, show
from planted import marked, planted

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

N = 10_000
RESID = "blocks.1.hook_resid_post"


def directions() -> torch.Tensor:
    return torch.randn(N, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    import prisma_view

    images = [(marked(1 - seed % 3, seed)[0], f"<b>{seed}</b>") for seed in range(9)]
    names = [f"unit <i>{at}</i>" if at % 2 else "" for at in range(N)]
    return prisma_view.gallery(
        planted(noise=0.3), images, RESID, directions=directions(), labels=names, k=3, out=folder / "gallery",
        title="<b>mine</b>", preprocess=None, batch=4, workers=0, progress=False,
    ).path  # fmt: skip


@pytest.fixture
def opened(browser: Chrome, page: Path) -> Chrome:
    browser.get("about:blank")  # the same address with another hash would not be opened anew
    return show(browser, page, 1280, 900)


def wait(browser: Chrome, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda driver: js(driver, f"return {script}"))


def unit(browser: Chrome, number: int) -> None:
    js(browser, "location.hash = arguments[0]", number)
    wait(browser, f"document.documentElement.dataset.unit === '{number}'")


def cards(browser: Chrome) -> list[str]:
    return js(browser, "return [...document.querySelectorAll('.unit-card h2 span')].map((e) => e.textContent)")


def find(browser: Chrome, text: str) -> None:
    js(
        browser,
        "const q = document.getElementById('query'); q.value = arguments[0]; q.dispatchEvent(new Event('input'))",
        text,
    )


def test_opens_from_disk_and_asks_for_its_own_files_alone(opened: Chrome, page: Path) -> None:
    assert js(opened, "return document.getElementById('count').textContent") == f"{N} of {N} directions"
    assert js(opened, "return document.querySelector('h1').textContent") == "<b>mine</b>"
    assert cards(opened)[:2] == ["0", "1 unit <i>1</i>"]
    wait(opened, "document.querySelectorAll('.unit-card .tile canvas').length === 72")
    unit(opened, N - 1)
    assert_quiet(opened, page, beside=True)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_scrolls_sideways(browser: Chrome, page: Path, width: int, theme: str) -> None:
    browser.get("about:blank")
    show(browser, page, width, 844)
    js(browser, "document.documentElement.dataset.theme = arguments[0]", theme)
    assert_no_sideways(browser)
    unit(browser, 77)
    assert_no_sideways(browser)
    assert_named(browser)
    assert js(browser, "return [...document.querySelectorAll('[role=img]')].every((e) => e.ariaLabel)")


def test_patches_are_lit_by_their_scores(opened: Chrome) -> None:
    unit(opened, 5)
    rows = js(
        opened,
        """return [...document.querySelectorAll('.images:not(.close) figure')].map((f) => {
        const c = f.querySelector('canvas'), p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return [f.querySelector('figcaption').textContent, Array.from({length: 9}, (_, i) => p[4 * i + 3])]; })""",
    )
    model = planted(noise=0.3)
    for caption, dark in rows:
        seed = int(caption.split("<b>")[1].split("<")[0])
        with torch.no_grad():
            _, cache = model.run_with_cache(marked(1 - seed % 3, seed), names=RESID)
        scores = cache[RESID][0].float() @ directions()[5]
        best = float(rows[0][0].split(" ")[0])
        expected = 205 * (1 - (scores[1:] / best).clamp(0, 1).sqrt())
        assert torch.tensor(dark).float() == pytest.approx(expected, abs=8)
    assert len({tuple(dark) for _, dark in rows}) == 3


def test_units_are_found_and_sorted(opened: Chrome) -> None:
    find(opened, "1234")
    assert js(opened, "return document.getElementById('count').textContent").startswith("1 of")
    find(opened, "UNIT <i>77")
    assert cards(opened)[0] == "77 unit <i>77</i>"
    find(opened, "")
    js(opened, "const o = document.getElementById('order'); o.value = 'strong'; o.dispatchEvent(new Event('change'))")
    largest = js(opened, "return [...document.querySelectorAll('.unit-card small')].map((e) => e.textContent)")
    values = [0.0 if each == "never above 0" else float(each.removeprefix("max ")) for each in largest]
    assert values == sorted(values, reverse=True)
    assert cards(opened)[0] != "0"


def test_keys_turn_pages_and_units(opened: Chrome) -> None:
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    body = opened.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.ARROW_RIGHT)
    assert js(opened, "return document.getElementById('page').textContent") == "2 of 417"
    assert cards(opened)[0] == "24"
    unit(opened, 41)
    body.send_keys(Keys.ARROW_RIGHT)
    wait(opened, "document.documentElement.dataset.unit === '42'")
    assert js(opened, "return document.querySelector('#unit h2').textContent") == "direction 42"
    body.send_keys("l")
    assert js(opened, "return getComputedStyle(document.querySelector('#unit canvas')).display") == "none"
    body.send_keys(Keys.ESCAPE)
    wait(opened, "document.getElementById('unit').hidden")
    body.send_keys("/")
    assert js(opened, "return document.activeElement.id") == "query"


def test_a_finger_opens_a_unit(browser: Chrome, page: Path) -> None:
    browser.get("about:blank")
    show(browser, page, 390, 844)
    box = js(
        browser,
        "const r = document.querySelector('.unit-card').getBoundingClientRect(); return [r.left + 40, r.top + 40]",
    )
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        for kind, points in (("touchStart", [{"x": box[0], "y": box[1]}]), ("touchEnd", [])):
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        wait(browser, "document.documentElement.dataset.unit === '0'")
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


@pytest.mark.parametrize("width", [390, 1000])
def test_one_unit_in_a_file_of_its_own(browser: Chrome, folder: Path, width: int) -> None:
    import prisma_view

    images = [(marked(1 - seed % 3, seed)[0], f"<b>{seed}</b>") for seed in range(9)]
    made = prisma_view.gallery(
        planted(noise=0.3), images, "blocks.1.mlp.hook_post", k=3, out=folder / "neurons",
        preprocess=None, batch=4, workers=0, progress=False,
    )  # fmt: skip
    page = made.unit(2).save(folder / "unit.html")
    show(browser, page, width, 900)
    wait(browser, "document.documentElement.dataset.unit === '0'")
    assert js(browser, "return document.querySelector('article h2').textContent") == "neuron 2"
    shown = js(browser, "return [...document.querySelectorAll('.images .tile')].map((e) => e.style.backgroundImage)")
    assert len(shown) >= 3
    assert all(each.startswith('url("data:image/jpeg') for each in shown)
    assert js(browser, "return document.querySelectorAll('main b').length") == len(shown)  # of values alone
    js(browser, "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
    assert js(browser, "return document.querySelector('article h2').textContent") == "neuron 2"
    assert_no_sideways(browser)
    assert_named(browser)
    assert_quiet(browser, page)
