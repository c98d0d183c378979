"""Images again of patches that a processor hands over one by one. In which order they lie, a known image tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

GRIDS = ("spatial_shapes", "image_grid_thw", "image_grid_hw")
ORDERS = ("(r s a b)", "(r a s b)")  # of patches: a few rows at once, or row by row
CELLS = ("(c t p q)", "(t c p q)", "(p q t c)", "(t p q c)")  # of what is in each; an image is alike in all frames
ALIKE = 0.99  # correlation, where an image that was hardly resized is compared


class Packing(NamedTuple):
    """Order of packed patches.

    Attributes:
        pattern: einops', from patches to frames of images.
        merge: how many rows of patches are listed at once.
        frames: how often each image is there.
    """

    pattern: str
    merge: int
    frames: int

    def image(self, made: Mapping[str, Any], channels: int) -> Tensor | None:
        """Return the image ``[channel height width]`` that patches were cut from, or None if they do not fit."""
        grid, pixels = grid_of(made), torch.as_tensor(made["pixel_values"]).float()
        if grid is None:
            return None
        cells = pixels.reshape(-1, pixels[0].numel() if pixels.ndim != 3 else pixels.shape[-1])
        side = math.isqrt(cells.shape[-1] // (channels * self.frames))
        if side * side * channels * self.frames != cells.shape[-1] or any(length % self.merge for length in grid):
            return None
        rows, columns = (length // self.merge for length in grid)
        sizes = {"a": self.merge, "b": self.merge, "c": channels, "t": self.frames, "p": side, "q": side}
        shown = rearrange(cells[: grid[0] * grid[1]], self.pattern, r=rows, s=columns, **sizes)
        return shown[0] if all(torch.equal(frame, shown[0]) for frame in shown) else None


def grid_of(made: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return how many rows and columns of patches an image was cut into, or None if that is not said."""
    for name in GRIDS:
        numbers = torch.as_tensor(made[name]).tolist() if name in made else []
        if len(numbers) == 1 and (len(numbers[0]) == 2 or numbers[0][0] == 1):
            return int(numbers[0][-2]), int(numbers[0][-1])
    return None


def packing(call: Callable[[Image], Mapping[str, Any]], processor: Any, channels: int) -> Packing | None:
    """Return how a processor's patches lie, or None if no order makes the image of them that was given."""
    first = call(_waves(200, 150))
    for candidate in _candidates(processor):
        seen = candidate.image(first, channels)
        if seen is None:
            continue
        waves = _waves(seen.shape[-1], seen.shape[-2])  # of the very size, so that it is not resized
        again = candidate.image(call(waves), channels)
        if again is not None and _alike(again, waves):
            return candidate
    return None


def _candidates(processor: Any) -> Iterator[Packing]:
    merge = int(getattr(processor, "merge_size", None) or 1)
    frames = int(getattr(processor, "temporal_patch_size", None) or 1)
    for order, cell in product(ORDERS, CELLS):
        yield Packing(f"{order} {cell} -> t c (r a p) (s b q)", merge, frames)


def _waves(width: int, height: int) -> Image:
    import numpy as np
    from PIL import Image as images

    y, x = np.mgrid[0:height, 0:width]
    waves = np.sin(np.stack([x / 4 + y / 9 + 1, x / 11 - y / 5, x / 6 + x * y / 900], -1))
    return images.fromarray((127.5 + 127.5 * waves).astype("uint8"))


def _alike(pixels: Tensor, image: Image) -> bool:
    import numpy as np

    pixels_of_image = torch.from_numpy(np.asarray(image.resize((pixels.shape[-1], pixels.shape[-2]))).copy())
    pairs = zip(pixels.flatten(1), pixels_of_image.permute(2, 0, 1).float().flatten(1), strict=True)
    return all(float(torch.corrcoef(torch.stack(pair))[0, 1]) > ALIKE for pair in pairs)
