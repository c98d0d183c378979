"""A browser without a screen, and a page for it to open."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """A headless Chromium that notes every request and every line on its console."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver fonts-noto-color-emoji")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'prisma-interp[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for argument in (
            "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-dev-shm-usage",
            "disable-background-networking", "disable-component-update", "disable-sync", f"user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        chrome.get("about:blank")  # the browser's own start page asks for things, which would count as the page's
        try:
            yield chrome
        finally:
            chrome.quit()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")
