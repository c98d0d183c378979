"""The page in a real browser: it opens from disk, asks no network, and answers mouse, keyboard and phone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from browsing import assert_named, assert_no_sideways, assert_quiet, js, show

from prisma_core import HookedViT, ModelSpec
from prisma_core.inputs import Preprocess
from prisma_core.spec import NormSpec

if TYPE_CHECKING:
    from prisma_view import Report
    from selenium.webdriver import Chrome

LABELS = ("🔴 red circle", "🟦 blue square", "⭐ yellow star", "tabby, tabby cat", "<b>& sons</b>")
ROWS, COLUMNS = 3, 4
MINUS = "\N{MINUS SIGN}"


def model() -> HookedViT:
    torch.manual_seed(3)
    image, norm = (8 * ROWS, 8 * COLUMNS), NormSpec(eps=1e-5)
    facts = {"norm": norm, "scale": 0.4, "d_mlp": 16, "registers": 1, "n_classes": len(LABELS)}
    spec = ModelSpec.plain(layers=3, patch=8, image=image, **facts)
    made = HookedViT(spec).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    made.preprocess = Preprocess(size=(8 * ROWS, 8 * COLUMNS))
    made.labels = LABELS
    made.reference = "test:small"
    return made


@pytest.fixture(scope="module")
def found() -> Report:
    from prisma_view import report

    blocks = (np.random.default_rng(seed).choice([0, 255], (ROWS, COLUMNS, 3)).astype(np.uint8) for seed in (1, 2))
    image, other = (each.repeat(20, axis=0).repeat(20, axis=1) for each in blocks)
    return report(model(), image, other)


@pytest.fixture(scope="module")
def page(found: Report, folder: Path) -> Path:
    from prisma_view import write_page

    return write_page(found, folder / "page.html")


@pytest.fixture
def opened(browser: Chrome, page: Path) -> Chrome:
    return show(browser, page, 1280, 900)


def text(browser: Chrome, selector: str) -> str:
    return js(browser, "return document.querySelector(arguments[0]).textContent", selector)


def cell(browser: Chrome, grid: str, patch: int) -> Any:
    return js(browser, "return document.querySelectorAll(arguments[0])[arguments[1]]", f"{grid} .cell", patch)


def test_opens_from_disk_without_errors_or_requests(opened: Chrome, page: Path) -> None:
    assert_quiet(opened, page)
    assert "https:" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_scrolls_sideways(browser: Chrome, page: Path, width: int, theme: str) -> None:
    show(browser, page, width, 844)
    js(browser, "document.documentElement.dataset.theme = arguments[0]", theme)
    assert_no_sideways(browser)


def test_hover_shows_class_and_logit(opened: Chrome, found: Report) -> None:
    from selenium.webdriver import ActionChains

    assert found.lens is not None
    patch = 5
    target = cell(opened, "#lens-grid", patch)
    js(opened, "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", target)
    ActionChains(opened).move_to_element(target).perform()
    logits = found.lens.logits[-1, 2 + patch]
    said = found.symbol(int(logits.argmax()))
    tip = text(opened, "#tip")
    assert tip.startswith(f"{said.emoji} {said.name}")
    assert f"logit {float(logits.max()):.1f}".replace("-", MINUS) in tip
    assert "row 2, column 2" in text(opened, "#patch-title").lower()
    assert said.name in text(opened, "#patch-guesses")


def test_the_slider_changes_the_layer(opened: Chrome, found: Report) -> None:
    assert found.lens is not None
    for stage in (0, 2):
        js(
            opened,
            """const slider = document.getElementById("layer");
            slider.value = arguments[0];
            slider.dispatchEvent(new Event("input", {bubbles: true}));""",
            stage,
        )
        shown = js(opened, "return [...document.querySelectorAll('#lens-grid .cell')].map((cell) => cell.textContent)")
        classes = found.lens.logits[stage, 2:].argmax(-1).tolist()
        assert shown == [found.symbol(index).emoji for index in classes]
        assert text(opened, "#stage") == ("embedding", "", "after block 1")[stage]
    pressed = js(opened, "return [...document.querySelectorAll('#strip button')].map((b) => b.ariaPressed)")
    assert pressed == ["false", "false", "true", "false"]


def test_colours_by_class_and_by_logit(opened: Chrome, found: Report) -> None:
    assert found.lens is not None

    def colours() -> list[str]:
        cells = "[...document.querySelectorAll('#lens-grid .cell')]"
        return js(opened, f"return {cells}.map((c) => c.style.backgroundColor)")

    classes = found.lens.logits[-1, 2:].argmax(-1).tolist()
    by_class = dict(zip(classes, colours(), strict=True))
    assert [by_class[index] for index in classes] == colours()
    assert len(set(by_class.values())) == len(set(classes)) > 1
    js(opened, "document.querySelector('input[value=logit]').click()")
    js(opened, "const of = document.getElementById('of'); of.value = '0'; of.dispatchEvent(new Event('change'))")
    values = found.lens.logits[-1, 2:, found.shown[0]]
    by_logit = colours()
    assert len(set(by_logit)) > 6
    # Viridis grows lighter: the largest logit's patch has more green than the smallest one's.
    green = [int(colour.split(",")[1]) for colour in by_logit]
    assert green[int(values.argmax())] > green[int(values.argmin())] + 50


def test_arrow_keys_move_between_patches(opened: Chrome) -> None:
    from selenium.webdriver import Keys

    first = cell(opened, "#lens-grid", 0)
    js(opened, "arguments[0].click(); arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_RIGHT)
    opened.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert "row 2, column 2" in text(opened, "#patch-title").lower()
    assert opened.switch_to.active_element.get_attribute("aria-label").startswith("patch in row 2, column 2")


def test_attention_follows_head_and_query(opened: Chrome, found: Report) -> None:
    js(opened, "document.querySelectorAll('#heads button')[arguments[0]].click()", 1 * 2 + 1)
    js(opened, "arguments[0].click()", cell(opened, "#attention-grid", 7))
    pattern = found.patterns[1, 1, 2 + 7]
    words = text(opened, "#attention-words")
    assert words.startswith("Block 1, head 1: the patch in row 2, column 4 reads")
    assert f"{round(100 * float(pattern.max()))} % from" in words
    js(opened, "document.querySelectorAll('#attention-tokens button')[1].click()")
    assert "the register 1 reads" in text(opened, "#attention-words")
    darkness = js(
        opened, "return [...document.querySelectorAll('#attention-grid .cell')].map((c) => c.style.backgroundColor)"
    )
    brightest = int(found.patterns[1, 1, 1, 2:].argmax())
    assert darkness[brightest].replace(" ", "") in ("rgba(8,9,14,0)", "rgb(89140/0)")


def test_a_bar_is_as_long_as_its_share(opened: Chrome, found: Report) -> None:
    drawn = js(
        opened,
        """return [...document.querySelectorAll('#top .bar')].map((track) =>
          track.firstChild.getBoundingClientRect().width / track.getBoundingClientRect().width)""",
    )
    shares = found.logits.softmax(-1).topk(len(drawn)).values.tolist()
    assert drawn == pytest.approx(shares, abs=0.03)


def test_attribution_adds_up_for_the_chosen_class(opened: Chrome, found: Report) -> None:
    js(opened, "document.querySelectorAll('#attribution-classes button')[2].click()")
    numbers = js(opened, "return [...document.querySelectorAll('#layers .number')].map((n) => n.textContent)")
    values = [float(number.replace(MINUS, "-")) for number in numbers]
    assert values[-1] == pytest.approx(float(found.logits[found.shown[2]]), abs=0.06)
    assert sum(values[:-1]) == pytest.approx(values[-1], abs=0.06 * len(values))


def test_patching_speaks_of_the_chosen_head(opened: Chrome, found: Report) -> None:
    assert found.patching is not None
    for where in ("all", "cls"):
        js(opened, "document.querySelector(`input[value=${arguments[0]}]`).click()", where)
        js(opened, "document.querySelectorAll('#patches .value')[arguments[0]].click()", 2 * 2 + 1)
        change = float(found.patching.change[where][2, 1])
        assert f"changes by {change:+.2f}".replace("-", MINUS) in text(opened, "#patches-words")
        visible = js(opened, "return [...document.querySelectorAll('.words')].filter((w) => !w.hidden).length")
        assert visible == 1


def test_labels_are_text_never_markup(opened: Chrome) -> None:
    assert js(opened, "return [...document.querySelectorAll('b')].some((b) => b.textContent.includes('sons'))") is False


def test_everything_to_press_has_a_name(opened: Chrome) -> None:
    assert_named(opened)
