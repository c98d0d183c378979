"""What the docs say is true: code runs, generated pages are up to date, links and commands exist, names are documented.

Every ``python`` block of a page runs, in order, in one namespace, without a network. A block whose first line is
``# NAME.py`` is written to that file, which the blocks behind it may import; a ``diff`` block changes such a file; a
``toml`` block with entry points is installed. A block whose first line is ``# needs the network`` is skipped, and
counted so; one whose first line is ``# needs nnsight`` runs where that library is installed.

A ``text`` block right behind a ``python`` or ``bash`` block is what that block prints: ``...`` stands for anything, and
numbers with an exponent for any such number. Only ``bash`` blocks with such a ``text`` block are run, in this process:
``prisma``, ``cd``, and ``pip install -e .``.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import linecache
import os
import re
import shlex
import socket
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import prisma_core as prisma
from prisma_core import host as plugins
from prisma_core import spec
from prisma_core.cli.app import build, main
from prisma_core.contract import hookspecs
from prisma_core.host import Host

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("plugin/*.md")),
    *sorted(ROOT.glob("plugins/*/README.md")),
]
FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NETWORK = "# needs the network\n"
NEEDS = re.compile(r"# needs (\w+)\n")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    online: bool
    shown: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    matches = list(FENCE.finditer(text))
    shown = {
        one.end(): two["text"]
        for one, two in itertools.pairwise(matches)
        if two["language"] == "text" and not text[one.end() : two.start()].strip()
    }
    return [
        Block(
            page,
            text.count("\n", 0, match.start("text")),
            match["language"],
            match["text"],
            match["text"].startswith(NETWORK),
            shown.get(match.end()),
        )
        for match in matches
    ]


ALL = [block for page in PAGES for block in blocks(page)]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with two images, no network and a host of its own."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a block of the docs called the network; mark it, or make it local")

    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_host", None)
    for name in ("cat.jpg", "dog.jpg"):
        noise = np.random.default_rng(len(name)).integers(0, 256, (80, 100, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    return tmp_path


def _installed(text: str, folder: Path) -> None:
    """Do to a project's entry points what installing it does."""
    project = tomllib.loads(text)["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _installed_here(block: Block) -> bool:
    """Whether the library is there that a block's first line names."""
    needed = NEEDS.match(block.text)
    return needed is None or importlib.util.find_spec(needed[1]) is not None


class Reading:
    """A reader who does what a page says, in a folder of one's own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.namespace: dict[str, Any] = {"__name__": "__docs__"}

    def forget(self) -> None:
        """Forget what was imported from the folder, and which plugins there are: its files have changed."""
        for name, module in list(sys.modules.items()):
            if str(self.folder) in str(getattr(module, "__file__", "")):
                self.monkeypatch.delitem(sys.modules, name)
        self.monkeypatch.setattr(plugins, "_host", None)
        importlib.invalidate_caches()

    def follow(self, block: Block) -> None:
        if block.language == "toml" and "entry-points" in block.text:
            _installed(block.text, self.folder)
            self.forget()
        elif block.language == "diff":
            self._change(block.text)
        elif block.language == "bash" and block.shown is not None:
            for line in block.text.splitlines():
                self._type(shlex.split(line))
        elif block.language == "python" and not block.online and _installed_here(block):
            if name := re.match(r"# ([\w/]+\.py)\n", block.text):
                Path(name[1]).write_text(block.text)
                self.forget()
            else:
                self._execute("\n" * block.line + block.text, str(block.page.relative_to(ROOT)))

    def _execute(self, text: str, name: str) -> None:
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # nnsight reads what it runs
        exec(compile(text, name, "exec"), self.namespace)

    def _type(self, words: list[str]) -> None:
        if words[0] == "cd":
            self.monkeypatch.chdir(words[1])
        elif words[:3] == ["pip", "install", "-e"]:
            _installed(Path("pyproject.toml").read_text(), self.folder)
            self.monkeypatch.syspath_prepend(os.getcwd())
            self.forget()
        else:
            assert words[0] == "prisma", f"only prisma, cd and pip install -e can be followed, not {words}"
            main(words[1:])

    def _change(self, text: str) -> None:
        name, *lines = text.splitlines()
        path = Path(name.removeprefix("--- "))
        gone, came = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        before = path.read_text()
        assert before.count(gone) == 1, f"{path} does not hold these lines once:\n{gone}"
        path.write_text(before.replace(gone, came))
        self.forget()


VARIES = re.compile(r"(\.\.\.|\d(?:\.\d+)?e[+-]\d\d)")


def _like(shown: str) -> re.Pattern[str]:
    """Return what matches the lines that a page shows, squeezed."""
    any_of = {True: ".*", False: r"\d(?:\.\d+)?e[+-]\d\d"}
    lines = [
        "(?:.*\n)*?"
        if line == "..."
        else "".join(
            any_of[part == "..."] if VARIES.fullmatch(part) else re.escape(part) for part in VARIES.split(line)
        )
        + "\n"
        for line in _squeezed(shown)
    ]
    return re.compile("".join(lines))


def _squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(
    page: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading = Reading(prepared, monkeypatch)
    try:
        for block in blocks(page):
            capsys.readouterr()
            reading.follow(block)
            if block.shown is not None and not block.online:
                printed = capsys.readouterr()
                lines = [*_squeezed(printed.out), *_squeezed(printed.err)]
                told = "".join(f"{line}\n" for line in lines)
                assert _like(block.shown).fullmatch(told), f"line {block.line} of {page.name} prints:\n{told}"
    finally:
        reading.forget()


@pytest.mark.parametrize(
    "block", [block for block in ALL if block.online], ids=lambda block: f"{block.page.name}:{block.line}"
)
def test_code_that_needs_the_network(block: Block) -> None:
    compile(block.text, str(block.page), "exec")
    pytest.skip("loads weights from the network, which no test does: only its syntax was checked")


def test_the_readme_has_code_that_loads_caches_patches_and_prints() -> None:
    (code,) = [block.text for block in blocks(ROOT / "README.md") if block.language == "python" and not block.online]
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    assert all(word in code for word in ("prisma.load(", "run_with_cache(", "run_with_hooks(", "print("))


def test_every_plugin_has_a_short_readme_with_an_example() -> None:
    plugins = {path.parent.name for path in ROOT.glob("plugins/*/__init__.py")}
    readmes = {page.parent.name: page for page in ROOT.glob("plugins/*/README.md")}
    assert plugins == set(readmes)
    for name, page in readmes.items():
        assert len(page.read_text(encoding="utf-8").splitlines()) <= 40, name
        assert any(block.language == "python" and not block.online for block in blocks(page)), name
        assert "pytest " in page.read_text(encoding="utf-8"), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        place = (page.parent / path) if path else page
        if not place.exists() or (anchor and anchor not in _anchors(place)):
            broken.append(target)
    assert broken == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_commands_in_the_docs_exist() -> None:
    named = {
        (block.page.name, name)
        for block in ALL
        if block.language in ("bash", "sh", "console")
        for name in re.findall(r"(?:^|&& |\$ )prisma (?:--debug )?([a-z][\w-]*)", block.text, flags=re.MULTILINE)
    }
    commands = set(typer.main.get_command(build(Host())).commands)  # type: ignore[attr-defined]
    assert named
    assert {name for _, name in named} <= commands
    readme = "\n".join(block.text for block in ALL if block.page == ROOT / "README.md")
    assert 'pip install -e ".[all]" && prisma demo' in readme
    assert 'pip install -e ".[all,test]" && pytest' in readme


def _every_command(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, command
    for each, inner in getattr(command, "commands", {}).items():
        yield from _every_command(inner, f"{name} {each}")


def test_every_command_and_option_is_on_a_page_with_its_help() -> None:
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    headings = dict(re.findall(r"^#+ `(prisma[^`]*)`\n(.*?)(?=^#|\Z)", text, re.M | re.S))
    missing = []
    for name, command in _every_command(typer.main.get_command(build(Host())), "prisma"):
        body = text.partition("\n## ")[0] if name == "prisma" else headings.get(name, "")
        words = [flag for param in command.params for flag in param.opts if flag.startswith("-")]
        words += [said for param in command.params if (said := getattr(param, "help", None))]
        shown = " ".join(body.split())
        missing += [f"{name} {each}" for each in ["", *words] if " ".join(each.split()) not in shown or not body]
    assert missing == []


def test_fifteen_jobs_take_at_most_five_lines_each() -> None:
    text = (DOCS / "fifteen-jobs.md").read_text(encoding="utf-8")
    jobs = re.findall(r"^## (\d+)\. .*?^```python\n(.*?)^```", text, re.M | re.S)
    assert [int(number) for number, _ in jobs] == list(range(1, 16))
    lines = {
        number: [line for line in code.splitlines() if line.strip() and not re.match(r"(import|from) ", line)]
        for number, code in jobs
    }
    assert {number: len(each) for number, each in lines.items() if len(each) > 5} == {}


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "references.md").read_text(encoding="utf-8")
    methods = [f"HookedModel.{name}" for name in ("hook_points", "resolve", "hooks", "caching")]
    methods += ["HookedModel.run_with_hooks", "HookedModel.run_with_cache"]
    assert [name for name in (*prisma.__all__, *methods) if f"`{name}" not in text] == []


def test_every_field_of_a_spec_is_named_for_plugins() -> None:
    text = (ROOT / "docs" / "plugin" / "reference.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+Spec|Interpolation)` \| (.*) \|$", text, flags=re.MULTILINE))
    assert {"ModelSpec", "EmbedSpec", "BlockSpec", "PoolSpec"} <= set(rows)
    for name, cells in rows.items():
        fields = [field for field in getattr(spec, name).model_fields if (name, field) != ("ModelSpec", "kind")]
        assert re.findall(r"`(\w+)`", cells) == fields, name


def test_every_plugin_hook_is_documented_and_documented_hooks_exist() -> None:
    text = (ROOT / "docs" / "plugin" / "reference.md").read_text(encoding="utf-8")
    hooks = {name for name in vars(hookspecs) if name.startswith("prisma_")}
    assert hooks == {"prisma_sources", "prisma_adapters", "prisma_cases", "prisma_commands"}
    assert set(re.findall(r"`(prisma_(?:sources|adapters|cases|commands)\w*)\b", text)) == hooks


def test_the_tests_that_the_security_page_names_are_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text("utf-8")
    files = {path.name: path.read_text("utf-8") for path in (ROOT / "conformance_tests").rglob("test_*.py")}
    named = set(re.findall(r"`(?:[\w/]+/)?(test_\w+)(\.py)?`", page))
    assert len(named) > 25
    gone = [
        name
        for name, ending in sorted(named)
        if (name + ending not in files if ending else not any(f"def {name}(" in text for text in files.values()))
    ]
    assert not gone, gone
