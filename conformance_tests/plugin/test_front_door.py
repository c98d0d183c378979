"""Plugins, template, worked example and docs import from ``prisma_core.plugin`` and ``prisma_core`` alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from prisma_conformance.new_plugin import _texts, _upstream

import prisma_core
from prisma_core import plugin

ROOT = Path(__file__).parents[2]
DOORS = {"prisma_core.plugin": set(plugin.__all__), "prisma_core": set(prisma_core.__all__)}
PRISMA = ("prisma", "prisma_core")
ROOMS = {path.stem for path in (ROOT / "prisma_core").iterdir() if path.suffix in ("", ".py")} - {"__init__", "plugin"}

KIT = {  # what the conformance kit imports from elsewhere, which no other plugin has a use for
    "prisma_core.transformer": "its equations go through the parts of canonical models: blocks, attention, norms",
    "prisma_core.upstream.observer": "it records upstream's tensors with what hooked upstreams run",
    "prisma_core.zoo": "it calls sources and adapters as load and adapt do, step by step",
    "prisma_core.maps.places": "it leaves out places inside fused kernels, which only a hooked upstream opens",
    "prisma_core.maps.rule": "its doctor writes other rows of weight tables",
    "prisma_core.maps.table": "its doctor fills in the marks of rows",
    "prisma_core.toolbox.tables": "it numbers the rows of hook maps as hooked upstreams do",
}


class Import(NamedTuple):
    file: str
    line: int
    module: str
    name: str

    def advice(self) -> str:
        doors = [door for door, names in DOORS.items() if self.name in names]
        what = f"from {doors[0]} import {self.name}" if doors else "neither door exports it: add it to one"
        return f"{self.file}:{self.line} takes {self.name} from {self.module}: {what}"


def imports(text: str, file: str) -> Iterator[Import]:
    """Yield what is imported from the core, inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "prisma_core":
            yield from (Import(file, node.lineno, str(node.module), one.name) for one in node.names)
        elif isinstance(node, ast.Import):
            inner = [one.name for one in node.names if one.name.startswith("prisma_core.")]
            yield from (Import(file, node.lineno, name, name.rpartition(".")[2]) for name in inner)
        elif isinstance(node, ast.Attribute) and node.attr in ROOMS and ast.unparse(node.value) in PRISMA:
            yield Import(file, node.lineno, f"prisma_core.{node.attr}", node.attr)


def wrong(text: str, file: str) -> list[Import]:
    return [one for one in imports(text, file) if one.name not in DOORS.get(one.module, ())]


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


OURS = [path for path in sources("plugins/prisma_*/**/*.py") if "prisma_conformance" not in path.parts]


def test_the_rule_sees_every_kind_of_import() -> None:
    text = """
import prisma_core.spec
import prisma_core as prisma
from prisma_core.errors import suggest, nothing
if TYPE_CHECKING:
    from prisma_core.maps.weights import WeightMap
def f():
    from prisma_core import tensors_of, hidden
    from prisma_core.plugin import Adapter
    return prisma.inputs.Preprocess
"""
    assert [(one.line, one.name) for one in wrong(text, "x")] == [
        (2, "spec"),
        (4, "suggest"),
        (4, "nothing"),
        (6, "WeightMap"),
        (8, "hidden"),
        (10, "inputs"),
    ]
    advice = {one.name: one.advice() for one in wrong(text, "x")}
    assert advice["WeightMap"].endswith("from prisma_core.plugin import WeightMap")
    assert "add it to one" in advice["nothing"]


@pytest.mark.parametrize("package", sorted({path.relative_to(ROOT).parts[1] for path in OURS}))
def test_our_plugins(package: str) -> None:
    files = [path for path in OURS if package in path.parts]
    assert files
    found = [one for path in files for one in wrong(path.read_text("utf-8"), str(path.relative_to(ROOT)))]
    assert not found, "\n".join(one.advice() for one in found)


def test_the_kit_and_its_exceptions() -> None:
    files = sources("plugins/prisma_conformance/**/*.py")
    found = [one for path in files for one in wrong(path.read_text("utf-8"), str(path.relative_to(ROOT)))]
    excused = {one: room for one in found for room in KIT if f"{one.module}.".startswith(f"{room}.")}
    assert not (rest := [one for one in found if one not in excused]), "\n".join(one.advice() for one in rest)
    needless = [one for one in excused if any(one.name in names for names in DOORS.values())]
    assert not needless, "\n".join(one.advice() for one in needless)
    assert set(excused.values()) == set(KIT), "an exception that nothing needs"


@pytest.mark.parametrize("as_map", [False, True])
@pytest.mark.parametrize("upstream", [None, "torch.nn.modules.linear.Linear"])
def test_the_template(upstream: str | None, as_map: bool) -> None:
    texts = _texts("acme", "acme", None if upstream is None else _upstream(upstream), as_map)
    written = {path: text for path, text in texts.items() if path.endswith(".py")}
    assert any("prisma_core.plugin" in text for text in written.values())
    found = [one for path, text in written.items() for one in wrong(text, path)]
    assert not found, "\n".join(one.advice() for one in found)


def test_the_docs_and_the_worked_example() -> None:
    found = [
        one for path in sources("docs/plugin/example/**/*.py") for one in wrong(path.read_text("utf-8"), path.name)
    ]
    for page in sources("README.md", "CONTRIBUTING.md", "docs/**/*.md"):
        for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
            found += wrong(block, page.name)
    assert not found, "\n".join(one.advice() for one in found)


@pytest.mark.parametrize("name", plugin.__all__)
def test_every_name_of_the_door_is_there_and_documented(name: str) -> None:
    assert hasattr(plugin, name)
    pages = [(ROOT / "docs" / page).read_text("utf-8") for page in ("plugin/reference.md", "references.md")]
    code = {word for page in pages for span in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"\w+", span)}
    assert name in code, (
        f"prisma_core.plugin.{name} stands in no line of docs/plugin/reference.md or docs/references.md"
    )


def test_no_name_stands_twice() -> None:
    for names in (plugin.__all__, prisma_core.__all__):
        assert len(names) == len(set(names))
    both = [name for name in plugin.__all__ if name in prisma_core.__all__]
    assert all(getattr(plugin, name) is getattr(prisma_core, name) for name in both)
