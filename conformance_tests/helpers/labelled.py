"""A small classifier with names for its classes, images for it, and the data of its page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from prisma_core import HookedViT, ModelSpec, TokenLayout
from prisma_core.inputs import Preprocess
from prisma_core.spec import (
    NormSpec,
)

LABELS = ("🔴 red circle", "🟦 blue square", "tabby, tabby cat", "<script>&", "qwertyuiop")


def model(**facts: Any) -> HookedViT:
    torch.manual_seed(5)
    given: dict[str, Any] = {"norm": NormSpec(eps=1e-5), "scale": 0.4, "d_mlp": 16, "n_classes": len(LABELS), **facts}
    spec = ModelSpec.plain(patch=8, image=(16, 24), **given)
    made = HookedViT(spec).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    made.preprocess = Preprocess(size=(16, 24))
    made.labels = LABELS if spec.n_classes == len(LABELS) else None
    return made


def two_heads() -> HookedViT:
    """Return a model that reads two tokens with a head each, so there is no one head to look through."""
    return model(n_heads_out=2, layout=TokenLayout(cls=1, distillation=1, rows=2, columns=3))


def image_of(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).choice([0, 255], (2, 3, 3)).astype(np.uint8)
    return Image.fromarray(blocks.repeat(20, axis=0).repeat(20, axis=1))


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


# -------------------------------------------------------------------- page and images
