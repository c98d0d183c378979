"""The page of techniques and the pages of plugins' public names, made from docstrings and ``__all__``."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import figures

ROOT = Path(__file__).parents[1]
PARTS = ("Equation", "Cost", "Misleads", "Source")
HEAD = """<!-- Written by `python docs/generate.py` from the docstrings of the techniques' files. -->
# Techniques

Each technique with what it computes and costs, when it misleads, and its source. All take any model that has what they need, and return a
[`Result`][prisma_core.Result] or tensors with named axes.

"""  # noqa: E501


REFERENCES = (
    "prisma_lens", "prisma_patch", "prisma_harvest", "prisma_sae", "prisma_view", "prisma_registers", "prisma_toy",
    "prisma_cite", "prisma_conformance",
)  # fmt: skip


GALLERY = """<!-- Written by `python docs/generate.py`; the figures by `python docs/figures.py`. -->
# Gallery

What each technique draws, on models that come with the package. A figure leads to the code that made it, ten lines or so, which the tests
run and compare with the figure.

[![The attention viewer: what a patch attends to, what attends to it, and the matrix of the head](images/attention.png)](how-to-attention-viewer.md)

[The attention viewer](how-to-attention-viewer.md) is a page to point at and click through; so are [overviews](how-to-report.md) and
[galleries of units](how-to-gallery.md).
"""  # noqa: E501


class Technique(NamedTuple):
    """A file that computes one thing, and the functions of it that its plugin exports."""

    module: str
    title: str
    parts: dict[str, str]
    names: tuple[str, ...]


def techniques() -> list[Technique]:
    """Return every file of a plugin whose docstring has the four parts."""
    return [one for path in sorted((ROOT / "plugins").glob("*/*.py")) if (one := _read(path)) is not None]


def _read(path: Path) -> Technique | None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = ast.get_docstring(tree) or ""
    found = re.split(rf"^({'|'.join(PARTS)}):\n", text, flags=re.MULTILINE)
    parts = dict(zip(found[1::2], found[2::2], strict=True))
    if set(parts) != set(PARTS):
        return None
    package = path.parent.name
    defined = {each.name for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)}
    names = tuple(name for name in _exported(path.parent / "__init__.py") if name in defined)
    title = " ".join(found[0].split()).rstrip(".")
    cleaned = {name: re.sub(r"^    ", "", part, flags=re.MULTILINE).rstrip() for name, part in parts.items()}
    return Technique(f"{package}.{path.stem}", title, cleaned, names)


def _exported(path: Path) -> list[str]:
    for each in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(each, ast.Assign) and getattr(each.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(each.value))
    return []


def page() -> str:
    """Return the page's text."""
    rows, sections, drawn = [], [], figures.names()
    for one in techniques():
        package = one.module.partition(".")[0]
        links = ", ".join(f"[`{name}`][{_home(package, name)}]" for name in one.names)
        rows.append(f"| [{_cell(one.title)}](#{_anchor(one.module)}) | {links} |")
        cost, misleads, source = (" ".join(one.parts[part].split()) for part in PARTS[1:])
        sections += [
            f"## {one.module}\n", f"{one.title}. {links}\n", f"```text\n{one.parts['Equation']}\n```\n",
            f"**Cost.** {cost}\n", f"**When it misleads.** {misleads}\n", f"**Source.** {source}\n",
            *(_example(one.module) if one.module in drawn else []),
        ]  # fmt: skip
    table = ["| technique | functions |", "| --- | --- |", *rows, ""]
    return HEAD + "\n".join([*table, *sections])


def _example(name: str) -> list[str]:
    """Return a technique's figure and the code that draws it, which the tests run."""
    _, _, code = figures.code(name).partition('"""\n\n')
    said = figures.caption(name)
    return [f"![{said}](images/techniques/{name}.png)\n", f"*{said}.*\n", f"```py\n{code.rstrip()}\n```\n"]


def gallery() -> str:
    """Return the page of all figures, each a link to the code that made it."""
    titles = {one.module: one.title.partition(":")[0] for one in techniques()}
    cells = []
    for name in figures.names():
        target, said = f"techniques.md#{_anchor(name)}", figures.caption(name)
        cells.append(f"[![{said}](images/techniques/{name}.png)]({target})<br>**[{titles[name]}]({target})**<br>{said}")
    cells += [""] * (-len(cells) % 2)
    rows = [f"| {' | '.join(cells[at : at + 2])} |" for at in range(0, len(cells), 2)]
    return "\n".join([GALLERY, "| | |", "| --- | --- |", *rows, ""])


def reference(package: str) -> str:
    """Return the page of a plugin's public names, in the order of its ``__all__``."""
    folder = ROOT / "plugins" / package
    names = [name for name in _exported(folder / "__init__.py") if _home(package, name) != f"{package}.{name}"]
    shadowed = [f"\n::: {_home(package, name)}\n    options:\n      heading_level: 3\n" for name in names]
    defined = {name for path in folder.glob("*.py") for name in _defined(path)}
    others = [f"`{name}`" for name in _exported(folder / "__init__.py") if name not in defined]
    also = f"\nConstants, types and hooks of the contract: {', '.join(others)}.\n" if others else ""
    return f"# {package}\n\n::: {package}\n" + "".join(shadowed) + also


def _defined(path: Path) -> set[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {each.name for each in body if isinstance(each, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(each)}


def _home(package: str, name: str) -> str:
    """Return where a public name is documented: in its file, if the file has the same name and hides it."""
    path = ROOT / "plugins" / package / f"{name}.py"
    return (
        f"{package}.{name}.{name}"
        if path.exists() and re.search(rf"^(def|class) {name}\b", path.read_text("utf-8"), re.M)
        else f"{package}.{name}"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
