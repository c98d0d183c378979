"""The site: it builds without a warning, no link is dead, and every public name has its place in the reference."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "zensical.toml"
TECHNIQUES = ("prisma_lens", "prisma_patch", "prisma_sae", "prisma_harvest", "prisma_view", "prisma_registers")


def pages_in(nav: list[object]) -> list[str]:
    each = [[one] if isinstance(one, str) else pages_in(*one.values()) for one in nav]  # type: ignore[attr-defined]
    return [page for pages in each for page in pages]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("zensical", reason="needs the site's generator: pip install 'prisma-interp[docs]'")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CONFIG, folder)
    for name in ("prisma_core", "plugins"):
        (folder / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder / "site"


@pytest.fixture(scope="module")
def anchors(site: Path) -> dict[Path, set[str]]:
    return {path: set(re.findall(r'\bid="?([^"\s>]+)', path.read_text("utf-8"))) for path in site.rglob("*.html")}


def test_no_link_is_dead(site: Path, anchors: dict[Path, set[str]]) -> None:
    dead = []
    for path in anchors:
        if path.name == "404.html":  # its links are absolute, since it may stand anywhere
            continue
        for target in re.findall(r'<a\b[^>]*?\bhref="([^"]*)"', path.read_text("utf-8")):
            address, _, anchor = html.unescape(target).partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            place = (path.parent / address).resolve() if address else path
            place = place / "index.html" if place.is_dir() else place
            if not place.exists() or (anchor and place in anchors and anchor not in anchors[place]):
                dead.append(f"{path.relative_to(site)} -> {target}")
    assert dead == []


@pytest.mark.parametrize("package", ["prisma_core", "prisma_core.plugin", *TECHNIQUES])
def test_every_public_name_has_its_place(package: str, anchors: dict[Path, set[str]]) -> None:
    every = {name.removesuffix("-1") for names in anchors.values() for name in names}
    words = {word for path in (ROOT / "docs").rglob("*.md") for word in re.findall(r"\w+", path.read_text("utf-8"))}
    module = importlib.import_module(package)
    missing = []
    for name in module.__all__:
        value = getattr(module, name)
        if (inspect.isfunction(value) or inspect.isclass(value)) and not hasattr(value, "prisma_impl"):
            home = value.__module__.partition(".")[0]
            found = bool({f"{package}.{name}", f"{package}.{name}.{name}", f"{home}.{name}"} & every)
        else:  # constants, types by another name, hooks of the contract: said in words
            found = name in words
        missing += [] if found else [name]
    assert missing == []


def test_the_site_holds_pages_and_no_sources(site: Path) -> None:
    kinds = {path.suffix for path in site.rglob("*") if path.is_file() and "assets" not in path.parts}
    assert kinds == {".html", ".json", ".css", ".png", ".svg", ".inv", ".xml"}


def test_every_page_is_in_the_navigation_once() -> None:
    listed = pages_in(tomllib.loads(CONFIG.read_text("utf-8"))["project"]["nav"])
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(there), "each page of docs/ has a line in zensical.toml"


def test_nothing_is_asked_of_another_server(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        loads = re.findall(r'<(?:script|img|iframe|source)\b[^>]*?\bsrc="(https?:[^"]*)"', text)
        loads += re.findall(r'<link\b[^>]*?rel="(?:stylesheet|preload|icon)"[^>]*?href="(https?:[^"]*)"', text)
        assert loads == [], path.relative_to(site)
