"""The map of the house: rooms, what each is for, and how long it is, measured from the tree.

``rooms()`` reads the order from import-linter's layers in ``pyproject.toml`` and the purpose of a room from the first
line of its package's docstring, so that neither is written twice. ``python docs/generate.py`` draws the figure and the
table of ``docs/design.md`` with it.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
SMALL_CORE = ("hooks", "maps", "contract", "plugin")
STEP = 50  # lines are rounded up to it, so that not every commit changes the page


class Room(NamedTuple):
    """A package or a module of ``prisma_core``.

    Attributes:
        floor: its place in the order of imports; 0 is what all others may import.
        lines: of Python, blank ones and docstrings counted.
        code: lines that are neither blank nor a comment nor a docstring.
    """

    name: str
    floor: int
    purpose: str
    lines: int
    code: int


def layers() -> list[list[str]]:
    """Return the rooms of each floor, the lowest first, as ``pyproject.toml`` has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (house,) = [contract for contract in settings["contracts"] if contract["type"] == "layers"]
    return [[name.strip() for name in layer.split("|")] for layer in reversed(house["layers"])]


def rooms() -> list[Room]:
    """Return the rooms of ``prisma_core``, the lowest first."""
    core = ROOT / "prisma_core"
    found: list[Room] = []
    for floor, names in enumerate(layers()):
        for name in names:
            folder, module = core / name, core / f"{name}.py"
            main = folder / "__init__.py" if folder.is_dir() else module
            doc = ast.get_docstring(ast.parse(main.read_text(encoding="utf-8"))) or ""
            files = sorted(folder.rglob("*.py")) if folder.is_dir() else [module]
            purpose = doc.partition("\n")[0].rstrip(".")
            found.append(Room(name, floor, purpose, sum(map(_lines, files)), sum(map(_code, files))))
    return found


def plugins() -> list[Room]:
    """Return the plugins that come with Prisma."""
    folders = [path for path in sorted((ROOT / "plugins").iterdir()) if (path / "__init__.py").is_file()]
    return [
        Room(
            path.name,
            0,
            (ast.get_docstring(ast.parse((path / "__init__.py").read_text(encoding="utf-8"))) or "").partition("\n")[0],
            sum(map(_lines, path.rglob("*.py"))),
            sum(map(_code, path.rglob("*.py"))),
        )
        for path in folders
    ]


def table() -> str:
    """Return the table of rooms, the street's upper end first."""

    def row(name: str, lines: int, code: int, about: str) -> str:
        return f"| {name} | {_about(lines)} | {_about(code)} | {about} |"

    rows = ["| room | lines | of them code | what is in it |", "| --- | ---: | ---: | --- |"]
    for room in reversed(rooms()):
        core = " (small core)" if room.name in SMALL_CORE else ""
        rows.append(row(f"`{room.name}`{core}", room.lines, room.code, room.purpose))
    small = [room for room in rooms() if room.name in SMALL_CORE]
    files = list((ROOT / "prisma_core").rglob("*.py"))
    names = f"`{'`, `'.join(SMALL_CORE)}`"
    rows.append(row("**small core**", sum(each.lines for each in small), sum(each.code for each in small), names))
    rows.append(row("**`prisma_core`**", sum(map(_lines, files)), sum(map(_code, files)), ""))
    return "\n".join(rows)


def figure() -> str:
    """Return the map as SVG: a floor for each layer, imports go down."""
    floors: dict[int, list[Room]] = {}
    for room in rooms():
        floors.setdefault(room.floor, []).append(room)
    width, height, gap, top = 860, 46, 8, 66
    total = top + (len(floors)) * (height + gap) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img" '
        'aria-label="The rooms of prisma_core, by floor; imports go down" font-family="system-ui, sans-serif">',
        f'<rect width="{width}" height="{total}" fill="#ffffff"/>',
        f'<rect x="10" y="10" width="{width - 20}" height="40" rx="6" fill="#e8eef7" stroke="#5b7db1"/>',
        text(20, 35, "plugins", 15, bold=True),
        text(100, 35, " · ".join(room.name.removeprefix("prisma_") for room in plugins()), 13),
    ]
    for row, floor in enumerate(sorted(floors, reverse=True)):
        y, here = top + row * (height + gap), floors[floor]
        each = (width - 20 - gap * (len(here) - 1)) / len(here)
        for column, room in enumerate(here):
            x, small = 10 + column * (each + gap), room.name in SMALL_CORE
            fill, line = ("#fdf1d8", "#c08a1e") if small else ("#f4f4f2", "#8a8a86")
            parts.append(
                f'<rect x="{x:.0f}" y="{y}" width="{each:.0f}" height="{height}" rx="6" fill="{fill}" stroke="{line}"/>'
            )
            parts.append(text(x + 10, y + 19, room.name, 15, bold=True))
            parts.append(text(x + each - 10, y + 19, f"{_about(room.lines)} lines", 12, end=True))
            parts.append(text(x + 10, y + 37, _cut(room.purpose, int(each / 6.3)), 12))
    parts.append(text(10, total - 12, "Imports go down. The small core is coloured.", 12))
    return "\n".join([*parts, "</svg>", ""])


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def _code(path: Path) -> int:
    source = path.read_text(encoding="utf-8")
    texts = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    beside = {number for text in texts for number in range(text.lineno, (text.end_lineno or text.lineno) + 1)}
    lines = enumerate(source.splitlines(), 1)
    return sum(number not in beside and bool(line.strip()) and line.strip()[0] != "#" for number, line in lines)


def _about(lines: int) -> str:
    return f"{-(-lines // STEP) * STEP:,}"


def _cut(text: str, length: int) -> str:
    text = text.replace("`", "")
    return text if len(text) <= length else text[: length - 1].rsplit(" ", 1)[0] + " …"


def text(x: float, y: float, text: str, size: int, *, bold: bool = False, end: bool = False) -> str:
    weight, anchor = ' font-weight="600"' if bold else "", ' text-anchor="end"' if end else ""
    return f'<text x="{x:.0f}" y="{y}" font-size="{size}"{weight}{anchor} fill="#222">{escape(text)}</text>'
