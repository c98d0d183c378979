"""A small model, images in a folder, and what tells two folders apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from planted import planted

from prisma_core import HookedViT
from prisma_core.plugin import Preprocess

NAMES = [("resid_post", 0), ("z", 1), ("mlp.hook_post", 1)]


@pytest.fixture
def model() -> HookedViT:
    """A ViT of 6 x 6 pixels whose weights are random, in float64, which reads images."""
    made = planted(noise=0.3, seed=1)
    made.preprocess = Preprocess(size=(6, 6))
    return made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """26 PNG files in two folders."""
    folder = tmp_path / "photos"
    for index in range(26):
        path = folder / ("cats" if index % 3 else "dogs") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (9 + index % 4, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def every_byte(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def content() -> Callable[[Path], dict[str, bytes]]:
    return every_byte


def references(model: HookedViT, pixels: torch.Tensor, batch: int, pos: Any = None) -> dict[str, torch.Tensor]:
    """Return what ``run_with_cache`` gives, in batches."""
    caches = [model.run_with_cache(part, names=NAMES, pos=pos)[1] for part in pixels.split(batch)]
    return {name: torch.cat([cache[name] for cache in caches]) for name in caches[0]}
