"""The attention viewer in a real browser: hover, click, keys, touch, sizes, dark; images, videos, windows and texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import numpy as np
import pytest
import torch
from browsing import assert_named, assert_no_sideways, assert_quiet, js, show
from prisma_view.colours import SCALE

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

NAMES = [
    "class token",
    "register 1",
    "register 2",
    *(f"patch in row {r}, column {c}" for r in (1, 2) for c in (1, 2, 3)),
]


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def truth(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and patterns ``[layer head query_pos key_pos]``."""
    _, cache = models.build(registers=2).run_with_cache(image, names=["hook_attn_scores", "hook_pattern"])
    stacked = [torch.stack([cache[name, layer][0].detach() for layer in (0, 1)]) for name in ("attn_scores", "pattern")]
    return stacked[0], stacked[1]


@pytest.fixture(scope="module")
def page(image: torch.Tensor, folder: Path) -> Path:
    import prisma_view

    return prisma_view.attention_page(models.build(registers=2), image, title="<b>mine</b>").save(folder / "a.html")


@pytest.fixture
def opened(browser: Chrome, page: Path) -> Chrome:
    return show(browser, page, 1280, 900)


def words(browser: Chrome) -> str:
    return js(browser, "return document.getElementById('words').textContent")


def title(browser: Chrome, board: str) -> str:
    return js(browser, "return document.getElementById(arguments[0]).textContent", f"{board}-title")


def at(browser: Chrome, selector: str, across: float, down: float) -> Any:
    """Move the mouse to a place of an element, given as shares of its width and height."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    element = browser.find_element(By.CSS_SELECTOR, selector)
    js(browser, "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    size = element.size
    chain = ActionChains(browser)
    chain.move_to_element_with_offset(element, int((across - 0.5) * size["width"]), int((down - 0.5) * size["height"]))
    chain.perform()
    js(browser, "return new Promise((then) => requestAnimationFrame(() => requestAnimationFrame(then)))")
    return chain


def percent(share: float) -> str:
    return "<0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def choose(browser: Chrome, layer: int, head: int) -> None:
    js(browser, "document.querySelectorAll('#heads button')[arguments[0]].click()", layer * 4 + head)
    js(browser, "return new Promise((then) => setTimeout(then, 50))")


def test_opens_from_disk_without_errors_or_requests(opened: Chrome, page: Path) -> None:
    assert_quiet(opened, page)
    assert js(opened, "return document.querySelector('h1 code').textContent") == "<b>mine</b>"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_scrolls_sideways(browser: Chrome, page: Path, width: int, theme: str) -> None:
    show(browser, page, width, 844)
    js(browser, "document.documentElement.dataset.theme = arguments[0]", theme)
    assert_no_sideways(browser)


def test_everything_to_press_has_a_name(opened: Chrome) -> None:
    assert_named(opened)


def test_pointing_at_a_patch_shows_both_ways(opened: Chrome, truth: Any) -> None:
    choose(opened, 1, 2)
    pattern = truth[1][1, 2]
    at(opened, "#out .pad canvas", 5 / 6, 3 / 4)
    assert title(opened, "out") == f"{NAMES[8]} attends to"
    assert title(opened, "in") == f"attends to {NAMES[8]}"
    numbers = {
        board: js(opened, f"return [...document.querySelectorAll('#{board} small')].map((e) => e.textContent)")
        for board in ("out", "in")
    }
    assert numbers["out"] == [percent(float(x)) for x in pattern[8, :3]]
    assert numbers["in"] == [percent(float(x)) for x in pattern[:3, 8]]
    at(opened, "h1", 0.5, 0.5)
    assert title(opened, "out") == "class token attends to"


def test_a_click_keeps_the_token_and_says_it(opened: Chrome, truth: Any) -> None:
    choose(opened, 0, 3)
    at(opened, "#out .pad canvas", 1 / 6, 1 / 4).click().perform()
    at(opened, "h1", 0.5, 0.5)
    pattern = truth[1][0, 3]
    best, giver = int(pattern[3].argmax()), int(pattern[:, 3].argmax())
    text = words(opened)
    assert text.startswith(f"Layer 0, head 3. {NAMES[3]} attends most to {NAMES[best]} ({percent(pattern[3, best])})")
    assert f"gets most from {NAMES[giver]} ({percent(pattern[giver, 3])})" in text


def test_the_matrix_tells_query_and_key(opened: Chrome, truth: Any) -> None:
    choose(opened, 1, 1)
    at(opened, "#matrix", 7.5 / 9, 2.5 / 9)
    tip = js(opened, "return document.getElementById('tip').textContent")
    assert tip == f"{NAMES[2]} → {NAMES[7]}: {percent(truth[1][1, 1, 2, 7])}"
    assert title(opened, "out") == f"{NAMES[2]} attends to"
    assert title(opened, "in") == f"attends to {NAMES[7]}"


def test_keys_move_between_patches_heads_layers_and_scores(opened: Chrome, truth: Any) -> None:
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    choose(opened, 0, 0)
    pad = opened.find_element(By.CSS_SELECTOR, "#out .pad")
    pad.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert title(opened, "out") == f"{NAMES[7]} attends to"
    pad.send_keys("l", "h", "h", "H", "s")
    js(opened, "return new Promise((then) => setTimeout(then, 100))")
    scores = truth[0][1, 1]
    best = int(scores[7].argmax())
    number = f"{float(scores[7, best]):.2f}".replace("-", "\N{MINUS SIGN}")
    assert words(opened).startswith(f"Layer 1, head 1. {NAMES[7]} attends most to {NAMES[best]} ({number})")
    assert js(opened, "return document.querySelector('[value=scores]').checked")


def test_colours_are_those_of_the_values(opened: Chrome, truth: Any) -> None:
    choose(opened, 1, 3)
    js(opened, "const c = document.getElementById('cover'); c.value = 100; c.dispatchEvent(new Event('input'))")
    pattern = truth[1][1, 3, 0, 3:]
    green = js(
        opened,
        """const c = document.querySelector('#out canvas'), ink = c.getContext('2d');
        return [0, 1].flatMap((r) => [0, 1, 2].map((k) =>
          ink.getImageData(c.width * (k + .5) / 3, c.height * (r + .5) / 2, 1, 1).data[1]))""",
    )
    stops = np.linspace(0, 1, len(SCALE))
    expected = np.interp((pattern / pattern.max()).numpy(), stops, [colour[1] for colour in SCALE])
    assert np.ptp(expected) > 60
    np.testing.assert_allclose(green, expected, atol=2)


def test_a_finger_chooses_a_token(browser: Chrome, page: Path) -> None:
    show(browser, page, 390, 844)
    box = js(
        browser,
        """const c = document.querySelector('#in .pad canvas');
        c.scrollIntoView({block: 'center', behavior: 'instant'}); const r = c.getBoundingClientRect();
        return [r.left + r.width / 2, r.top + r.height / 4]""",
    )
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        for kind, points in (("touchStart", [{"x": box[0], "y": box[1]}]), ("touchEnd", [])):
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        js(browser, "return new Promise((then) => setTimeout(then, 100))")
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert title(browser, "in") == f"attends to {NAMES[4]}"


def test_boards_follow_the_window(opened: Chrome) -> None:
    def width() -> int:
        return js(opened, "return document.querySelector('#out canvas').width")

    wide = width()
    for size in (700, 1280):
        opened.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        js(opened, "return new Promise((then) => setTimeout(then, 100))")
        assert width() == js(opened, "return Math.round(document.querySelector('#out .pad').clientWidth)")
    assert width() == wide


def test_heads_are_drawn_and_the_tour_leads_to_them(opened: Chrome, truth: Any) -> None:
    js(opened, "return new Promise((then) => setTimeout(then, 300))")
    drawn = js(
        opened,
        """const ink = document.querySelector('#heads .thumbs').getContext('2d');
        const green = (x, y) => ink.getImageData(x, y, 1, 1).data[1];
        return [...document.querySelectorAll('#heads button')].map((b) => [0, 1].flatMap((r) => [0, 1, 2].map((k) =>
          green(b.offsetLeft + b.offsetWidth * (k + .5) / 3, b.offsetTop + b.offsetHeight * (r + .5) / 2))))""",
    )
    stops = np.linspace(0, 1, len(SCALE))
    for number, green in enumerate(drawn):
        pattern = truth[1][number // 4, number % 4, 0, 3:]
        expected = np.interp((pattern / pattern.max()).numpy(), stops, [colour[1] for colour in SCALE])
        np.testing.assert_allclose(green, expected, atol=2)
    name = js(opened, "const b = document.querySelector('#tour button'); b.click(); return b.textContent")
    layer, head = name.split("layer ")[1].split(",")[0].split(" head ")
    js(opened, "return new Promise((then) => setTimeout(then, 100))")
    assert words(opened).startswith(f"Layer {layer}, head {head}.")


def test_the_tour_goes_through_heads_by_their_scores(opened: Chrome, image: torch.Tensor) -> None:
    from prisma_lens import head_scores
    from selenium.webdriver import Keys
    from selenium.webdriver.common.by import By

    scores = head_scores(models.build(registers=2), image)
    name = js(opened, "const b = document.querySelector('#tour button'); b.click(); return b.textContent").split(":")[0]
    at = scores.names("kind").index(name.replace(" ", "_"))
    more = (scores.values[at] - scores.tensors["baseline"][at]).flatten()
    best = [int(each) for each in more.argsort(descending=True) if more[each] > 0.005]
    ranked = js(opened, "return [...document.querySelectorAll('#ranked button')].map((b) => b.textContent)")
    assert [each.rpartition(" +")[0] for each in ranked] == [f"layer {i // 4} head {i % 4}" for i in best]
    pad = opened.find_element(By.CSS_SELECTOR, "#out .pad")
    for key, place in (("", 0), ("n", 1 % len(best)), ("N", 0), ("N", len(best) - 1)):
        pad.send_keys(key or Keys.SHIFT)
        js(opened, "return new Promise((then) => setTimeout(then, 100))")
        assert words(opened).startswith(f"Layer {best[place] // 4}, head {best[place] % 4}.")
        pressed = js(
            opened, "return [...document.querySelectorAll('#ranked [aria-pressed=true]')].map((b) => b.textContent)"
        )
        assert pressed == [ranked[place]]


def test_keys_cover_the_image_more_and_less(opened: Chrome) -> None:
    from selenium.webdriver.common.by import By

    def middle() -> list[int]:
        return js(
            opened,
            """const c = document.querySelector('#out canvas');
            return [...c.getContext('2d').getImageData(c.width / 2 + 9, 9, 1, 1).data]""",
        )

    before = middle()
    pad = opened.find_element(By.CSS_SELECTOR, "#out .pad")
    pad.send_keys("c", "c")
    assert js(opened, "return document.getElementById('cover').value") == "90"
    assert middle() != before
    pad.send_keys("C", "C")
    assert middle() == before


def test_a_video_shows_its_frames(browser: Chrome, folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'prisma-interp[hf]'")
    import prisma_view

    import prisma_core as prisma

    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=8, tubelet_size=2, hidden_size=24, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = prisma.adapt(transformers.VideoMAEForVideoClassification(config).eval())
    page = prisma_view.attention_page(model, torch.randn(1, 8, 3, 32, 32)).save(folder / "video.html")
    show(browser, page, 1280, 900)
    at(browser, "#out .pad canvas", 7 / 8, 5 / 8)  # four frames, two by two: the last one's upper right patch
    assert title(browser, "out") == "frame 4, patch in row 1, column 2 attends to"
    assert_quiet(browser, page)


def test_windows_are_chosen(browser: Chrome, folder: Path) -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install 'prisma-interp[timm]'")
    import prisma_view

    import prisma_core as prisma

    sizes = {"img_size": 56, "embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}
    torch.manual_seed(0)
    upstream = timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval()
    for block in upstream.layers[0].blocks:
        torch.nn.init.normal_(block.attn.qkv.weight)
    model = prisma.adapt(upstream)
    x = torch.randn(1, 3, 56, 56)
    page = prisma_view.attention_page(model, x).save(folder / "swin.html")
    show(browser, page, 1280, 900)
    js(browser, "const s = document.getElementById('layer'); s.value = 1; s.dispatchEvent(new Event('change'))")
    js(browser, "return new Promise((then) => setTimeout(then, 100))")
    js(browser, "const s = document.getElementById('window'); s.value = 3; s.dispatchEvent(new Event('change'))")
    js(browser, "return new Promise((then) => setTimeout(then, 100))")
    _, cache = model.run_with_cache(x, names="hook_pattern")
    first = list(cache.values())[1][0, 3, 1, 0]
    at(browser, "#out .pad canvas", 0.5 / 7, 0.5 / 7)
    best = int(first.argmax())
    at(browser, "h1", 0.5, 0.5)
    assert "window 3" in words(browser)
    assert (
        f"attends most to place in row {best // 7 + 1}, column {best % 7 + 1} ({percent(float(first[best]))})"
        in words(browser)
    )
    assert_quiet(browser, page)


def test_frames_are_windows_over_their_own_image(browser: Chrome, folder: Path) -> None:
    kinds: Any = pytest.importorskip("transformers", reason="needs transformers: pip install 'prisma-interp[hf]'")
    import prisma_view
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    import prisma_core as prisma

    sizes = {"image_size": 32, "patch_size": 16, "num_frames": 2, "hidden_size": 16, "num_hidden_layers": 1}
    config = kinds.TimesformerConfig(**sizes, num_attention_heads=2, intermediate_size=20)
    video = torch.zeros(1, 2, 3, 32, 32)
    video[0, 1, :, :16] = 1  # the upper half of the second frame
    model = prisma.adapt(kinds.TimesformerModel(config).eval())
    page = prisma_view.attention_page(model, video).save(folder / "frames.html")
    show(browser, page, 1280, 900)
    js(browser, "const c = document.getElementById('cover'); c.value = 0; c.dispatchEvent(new Event('input'))")
    Select(browser.find_element(By.ID, "layer")).select_by_index(0)
    js(browser, "return new Promise((then) => setTimeout(then, 100))")
    assert js(browser, "return document.getElementById('window-kind').textContent") == "Patch"
    assert title(browser, "out") == "frame 1 attends to"
    assert_quiet(browser, page)
    Select(browser.find_element(By.ID, "layer")).select_by_index(1)
    middle = """const c = document.querySelector('#out canvas');
        return c.getContext('2d').getImageData(c.width * .3, c.height * .3, 1, 1).data[0]"""
    for frame in (0, 1):
        Select(browser.find_element(By.ID, "window")).select_by_index(frame)
        js(browser, "return new Promise((then) => setTimeout(then, 100))")
        assert f", frame {frame}. class token attends" in words(browser)
        assert js(browser, middle) == 255 * frame


def test_figures_open_without_errors_or_requests(browser: Chrome, folder: Path) -> None:
    import prisma_view

    layout = models.build(registers=2).layout
    figure = prisma_view.patches(torch.randn(9), layout, torch.randn(3, 8, 12), unit="<i>norm</i>")
    page = figure.save(folder / "figure.html")
    show(browser, page, 900, 800)
    assert js(browser, "return document.querySelectorAll('#figure .heatmaplayer image').length") == 1
    assert js(browser, "return document.querySelectorAll('#figure .imagelayer image').length") == 1
    assert "<i>norm</i>" in js(browser, "return document.querySelector('#figure').textContent")
    assert_quiet(browser, page)


def test_figures_in_a_notebook_replace_their_still_image(browser: Chrome, folder: Path) -> None:
    code = """
import sys, torch
from prisma_core import Result
results = [Result(torch.randn(3, 4), ("layer", "head"), technique="patch") for _ in range(2)]
open(sys.argv[1], "w").write(f"<!doctype html><link rel=icon href=data:,>{''.join(r._repr_html_() for r in results)}")
"""
    import subprocess
    import sys

    page = folder / "notebook.html"
    subprocess.run([sys.executable, "-c", code, str(page)], check=True)
    assert page.read_text().count("plotly.js v") == 1
    browser.get(page.resolve().as_uri())
    js(browser, "return new Promise((then) => setTimeout(then, 1500))")
    assert js(browser, "return document.querySelectorAll('.js-plotly-plot .heatmaplayer image').length") == 2
    assert js(browser, "return document.querySelectorAll('figure > img').length") == 0
