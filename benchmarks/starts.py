"""Whole processes: import Prisma, and load a model with it, against doing without it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from timing import Options, Row, Side, timed

MODELS = ("vit_base_patch16_224",)


def process(code: str) -> Side:
    """Return a run of a Python of its own, which imports everything anew."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def rows(options: Options) -> Iterator[Row]:
    row = Row("starts", "", 0, "import prisma_core", "import torch")
    yield timed(row, process(row.what), process(row.against), options, warm=1)
    for name in options.models:
        ours = f"import prisma_core; prisma_core.load('timm:{name}', pretrained=False)"
        theirs = f"import timm; timm.create_model('{name}')"
        row = Row("starts", name, 0, "import, load", "import timm, create_model")
        yield timed(row, process(ours), process(theirs), options, warm=1)
