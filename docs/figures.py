"""The figures of techniques: each file of ``examples/`` is run, and the figure that it ends in is drawn.

``python docs/figures.py`` draws all of them anew, ``python docs/figures.py prisma_lens.lens`` some.
"""

from __future__ import annotations

import ast
import io
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops

DOCS = Path(__file__).parent
EXAMPLES = DOCS / "examples"
FIGURES = DOCS / "images" / "techniques"
DRAWN_WITH = "3.8"  # matplotlib's release; another draws letters otherwise
LIKE = 2.0  # of 255, the mean over an image at a quarter of its size


def names() -> list[str]:
    """Return the techniques with an example."""
    return sorted(path.stem for path in EXAMPLES.glob("*.py"))


def caption(name: str) -> str:
    """Return what an example draws, in a line."""
    return (ast.get_docstring(ast.parse(code(name))) or "").rstrip(".")


def code(name: str) -> str:
    """Return an example's text."""
    return (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")


def run(name: str) -> Any:
    """Run an example, and return its figure."""
    torch.manual_seed(0)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["figure"]


def drawn(chart: Any) -> Image.Image:
    """Return a chart as a small image."""
    from prisma_view import still

    stream = io.BytesIO()
    still.draw(chart).savefig(stream, format="png", dpi=70)
    return Image.open(stream).convert("RGB")


def stored(name: str) -> Image.Image:
    """Return a technique's figure, as it is in the docs."""
    return Image.open(FIGURES / f"{name}.png").convert("RGB")


def alike(one: Image.Image, other: Image.Image) -> bool:
    """Return whether two images show the same, to the eye."""
    if any(abs(a - b) > 4 for a, b in zip(one.size, other.size, strict=True)):
        return False
    size = (one.width // 4, one.height // 4)
    return float(np.asarray(ImageChops.difference(one.resize(size), other.resize(size))).mean()) < LIKE


def main(chosen: list[str]) -> None:
    """Draw the figures of techniques, all of them where none are named."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in chosen or names():
        image = drawn(run(name).chart)
        image.quantize(128).save(FIGURES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
