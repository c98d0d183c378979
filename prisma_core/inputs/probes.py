"""Images that tell one preprocessing from another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prisma_core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES = ((61, 43), (43, 61), (481, 300))


def probe(width: int, height: int, seed: int = 0) -> Image:
    """Return an image with smooth parts and noise: resizing shows in either."""
    import numpy as np
    from PIL import Image as images

    y, x = np.mgrid[0:height, 0:width]
    waves = 127.5 + 127.5 * np.sin(np.stack([x / 3 + y / 17, x / 11 - y / 2, x * y / 200], -1))
    noise = np.random.default_rng(seed).integers(0, 256, waves.shape)
    return images.fromarray(np.where((x // 16 + y // 16)[..., None] % 2, waves, noise).astype("uint8"))


def fingerprint(preprocess: Callable[[Any], Tensor]) -> Tensor:
    """Return the tensors of the probe images in one row, to compare two preprocessings; an error counts as its text."""
    rows: list[Tensor] = []
    for size in SIZES:
        try:
            rows.append(preprocess(probe(*size)).flatten())
        except InputError as refusal:
            rows.append(torch.tensor(list(str(refusal).encode())).float())
    return torch.cat(rows)
