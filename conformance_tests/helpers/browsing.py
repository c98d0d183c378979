"""Pages in a browser: opening them, and what holds of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selenium.webdriver import Chrome


def show(browser: Chrome, page: Path, width: int, height: int) -> Chrome:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get_log("browser")
    browser.get_log("performance")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(page.resolve().as_uri())
    WebDriverWait(browser, 30).until(lambda driver: js(driver, "return document.documentElement.dataset.ready"))
    return browser


def js(browser: Chrome, script: str, *arguments: Any) -> Any:
    return browser.execute_script(script, *arguments)


def assert_quiet(browser: Chrome, page: Path, *, beside: bool = False) -> None:
    """The page's console is empty, and it asked for nothing but itself; with ``beside``, for files in its folder."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [each["params"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    # The browser's own start page may still be loading when the log is emptied; its requests name it as their document.
    urls = {each["request"]["url"] for each in requests if not each["documentURL"].startswith("chrome://")}
    urls = {url.partition("#")[0] for url in urls if not url.startswith(("data:", "blob:", "about:"))}
    address, folder = page.resolve().as_uri(), page.resolve().parent.as_uri()
    assert address in urls
    assert {url for url in urls - {address} if not (beside and url.startswith(f"{folder}/"))} == set()


def assert_no_sideways(browser: Chrome) -> None:
    """Nothing is wider than the window, but for what lies in a box that scrolls by itself."""
    wide = js(
        browser,
        """const { scrollWidth, clientWidth } = document.documentElement;
        const scrolls = (e) => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
        return [scrollWidth - clientWidth, [...document.querySelectorAll("main *, header *, footer *")]
          .filter((e) => e.getBoundingClientRect().right > clientWidth + 1 && !scrolls(e.parentElement))
          .map((e) => e.outerHTML.slice(0, 90))]""",
    )
    assert wide == [0, []]


def assert_named(browser: Chrome) -> None:
    """Everything that can be pressed or chosen has a name for a screen reader."""
    nameless = js(
        browser,
        """return [...document.querySelectorAll("button, input, select, canvas[role], [tabindex]")]
          .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent.trim()))
          .map((e) => e.outerHTML.slice(0, 90))""",
    )
    assert nameless == []
