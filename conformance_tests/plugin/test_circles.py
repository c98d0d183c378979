"""No circle of files in any of our packages, imports for type checkers and inside functions included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = [ROOT / "prisma_core", *sorted(path.parent for path in (ROOT / "plugins").glob("*/__init__.py"))]


def imports(*packages: Path) -> dict[str, set[str]]:
    """The modules of packages, each with those of them that it names in an import.

    That a module runs its package's ``__init__`` first is none of them: it would make a circle of every re-export.
    """
    files = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for package in packages
        for path in package.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names |= {
                    name if (name := f"{node.module}.{one.name}") in files else str(node.module) for one in node.names
                }
        graph[module] = names & set(files)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle in the order of their imports, the first one again at the end; none if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_circle_of_files(package: Path) -> None:
    graph = imports(package)
    assert sum(map(len, graph.values())) >= len(graph) - 1, "a module that neither imports nor is imported"
    assert circle(graph) == []


def test_no_circle_through_several_packages() -> None:
    assert circle(imports(*PACKAGES)) == []


@pytest.mark.parametrize(
    "line",
    [
        "from acme import spec",
        "import acme.spec",
        "def f():\n    from acme.spec import Spec",
        "if TYPE_CHECKING:\n    from acme.spec import Spec",
    ],
)
def test_a_circle_is_seen_wherever_the_import_stands(tmp_path: Path, line: str) -> None:
    acme = tmp_path / "acme"
    acme.mkdir()
    (acme / "__init__.py").write_text("from acme.spec import Spec")
    (acme / "spec.py").write_text("from acme.model import Model")
    (acme / "model.py").write_text("import torch")
    assert circle(imports(acme)) == []
    (acme / "model.py").write_text(line)
    assert circle(imports(acme)) in (
        ["acme.spec", "acme.model", "acme.spec"],
        ["acme.model", "acme.spec", "acme.model"],
    )
