"""Nothing is written in place: every call that writes stands in a block that replaces."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import prisma_core as prisma

# Calls that write, and where one may stand outside of a block that replaces: what is written there is new or temporary.
WRITES = {"write_text", "write_bytes", "save_file", "savefig", "write_html", "write_image", "save_objects"}
ELSEWHERE = {
    "prisma_core/files/unpickled.py": "save_objects itself",
    "plugins/prisma_clip/texts.py": "a processor's folder, which save made",
    "plugins/prisma_hf/processors.py": "a processor's folder, which save made",
    "plugins/prisma_hf/texts.py": "a processor's folder, which save made",
    "plugins/prisma_view/still.py": "a stream in memory",
}
SAFE = {"replacing", "replacing_both", "staging", "TemporaryDirectory"}


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def writes(tree: ast.AST, safe: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the line and name of each call that writes where nothing replaces."""
    for node in ast.iter_child_nodes(tree):
        inside = safe or (
            isinstance(node, ast.With)
            and any(isinstance(one.context_expr, ast.Call) and name_of(one.context_expr) in SAFE for one in node.items)
        )
        if isinstance(node, ast.Call) and not inside:
            name, given = name_of(node), [getattr(one, "value", None) for one in node.args]
            module = getattr(getattr(node.func, "value", None), "id", "")
            own = isinstance(node.func, ast.Name) and name == "write_text"
            if (name in WRITES and not own) or (name == "save" and module == "torch"):
                yield node.lineno, name
            if name == "open" and any(isinstance(mode, str) and set(mode) & set("wx") for mode in given[:2]):
                yield node.lineno, name
        yield from writes(node, inside)


def test_nothing_is_written_in_place() -> None:
    root = Path(prisma.__file__).parents[1]
    files = [*root.glob("prisma_core/**/*.py"), *root.glob("plugins/**/*.py")]
    found = {
        str(path.relative_to(root)): list(writes(ast.parse(path.read_text(encoding="utf-8"))))
        for path in files
        if "templates" not in path.parts
    }
    assert {name: calls for name, calls in found.items() if calls and name not in ELSEWHERE} == {}
    assert {name for name in ELSEWHERE if not found[name]} == set()  # none is left over


def test_a_write_in_place_is_seen() -> None:
    code = "with replacing(p) as q:\n q.write_text(x)\np.write_text(x)\ntorch.save(x, p)\nopen(p, 'w')\n"
    code += "write_text(p, x)"
    assert list(writes(ast.parse(code))) == [(3, "write_text"), (4, "save"), (5, "open")]
