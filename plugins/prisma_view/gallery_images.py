"""The images of a gallery: the top ones read and run again, small, with the score of each of their patches."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from prisma_harvest import Pass
from prisma_harvest.items import opened
from prisma_harvest.manifest import token_positions
from prisma_harvest.progress import counting
from prisma_harvest.scoring import Units as SearchUnits
from prisma_lens.inputs import vision_of
from torch import Tensor

from prisma_core import InputError, Result, TokenLayout
from prisma_view.viewer import frames_of, prepare

if TYPE_CHECKING:
    from prisma_view.gallery_units import Units

SIDE = 128
"""Pixels of the longer side of a small image."""
_CLOSE, _MOST = 0.05, 0.9


@dataclass
class Shown:
    """Small images and scores of patches.

    Attributes:
        thumbs: small images, all of one size, in the order in which units need them.
        thumb: which of them, ``[unit rank]``; -1 where there is none.
        spot: the frame, row and column of the top token, ``[unit rank 3]``; -1 where it is no patch.
        heat: the score of each patch of the frame in 255ths of the unit's largest, ``[unit rank row column]``.
        names: the name of the top token, by its number among those that were searched.
        pixels: the first images, as the model takes them.
        mean: of heads: the mean output at the top tokens, ``[head d_head]``.
    """

    thumbs: list[Image.Image]
    thumb: np.ndarray
    spot: np.ndarray
    heat: np.ndarray
    names: list[str]
    pixels: Tensor
    mean: Tensor


@dataclass(frozen=True)
class _Chosen:
    """Some items of a data set, by number."""

    get: Any
    sources: list[int]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Any:
        return self.get(self.sources[index])


@dataclass(frozen=True)
class _Grid:
    """Which token of those that were searched is which patch: ``cells [token 3]`` of frame, row and column, or -1."""

    cells: np.ndarray
    names: list[str]
    shape: tuple[int, int]

    @classmethod
    def of(cls, layout: TokenLayout | None, chosen: list[int] | None, n: int) -> _Grid:
        if layout is None or chosen is None:  # an axis that is not that of the tokens
            return cls(np.full((n, 3), -1), [f"token {at}" if layout is None else "" for at in range(n)], (0, 0))
        grid = layout.grid(torch.arange(layout.n_tokens), axis=0).reshape(layout.frames, layout.rows, layout.columns)
        every = np.full((layout.n_tokens, 3), -1)
        every[grid.flatten().numpy()] = np.indices(grid.shape).reshape(3, -1).T
        names = layout.token_names()
        return cls(every[chosen], [names[at] for at in chosen], (layout.rows, layout.columns))


def lit(run: Pass, units: Units, top: Result, progress: bool | None) -> Shown:
    """Return the top images of units, small, with their patches' scores: each image is read and run once.

    Raises:
        InputError: the images, or the units, are not those that the result is of.
    """
    examples = top.tensors["example"]
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for unit, row in enumerate(examples.tolist()):
        for rank, example in enumerate(row):
            if example >= 0:
                wanted[example].append((unit, rank))
    order = list(wanted)
    lines = top.facts["examples"]
    sources = [int(lines[str(example)].get("source") or example) for example in order]
    if run.source.n is not None and max(sources, default=0) >= run.source.n:
        raise InputError(f"top= names image {max(sources)}, and there are {run.source.n}: these are other images.")
    again = Pass(
        run.model, _Chosen(run.source.get, sources), [units.name], pos=units.pos, batch=run.batch,
        preprocess=run.preprocess, workers=run.workers, note=run.note,
    )  # fmt: skip
    point, shape = again.points[0], tuple(examples.shape)
    searched = SearchUnits(**units.search())
    layout = point.grid or again.layout
    grid = _Grid.of(layout, token_positions(layout, again.pos, point), point.n_tokens)
    largest = top.values.amax(1).clamp_min(1e-12)
    shown = Shown(
        [], np.full(shape, -1), np.full((*shape, 3), -1), np.zeros((*shape, *grid.shape), np.uint8), grid.names,
        torch.empty(0), torch.zeros(shape[0], *(point.shape[-1:] if units.kind == "head" else (0,))),
    )  # fmt: skip
    close = at = 0
    with counting("Drawing", len(order), 0, progress) as advance:
        for batch, activations in again.run():
            if at == 0 and batch.pixels is not None:
                shown.pixels = batch.pixels[:16].clone()
            for x in activations[units.name]:
                scores = searched.scores(x[None], point)[0]
                x = point.by_token(x[None])[0]
                thumbs = _Thumbs(run, sources[at], shown.thumbs)
                if scores.shape[1] != shape[0]:
                    raise InputError(
                        f"top= is of {shape[0]} units, and {units.name} has {scores.shape[1]}. Features need the "
                        "coder that they are of: coder=, or --coder."
                    )
                for unit, rank in wanted[order[at]]:
                    token = int(top.tensors["token"][unit, rank])
                    values = scores[:, unit]
                    off = abs(float(values[token]) - float(top.values[unit, rank]))
                    close += off <= _CLOSE * float(largest[unit].abs()) + 1e-3
                    spot = grid.cells[token]
                    shown.spot[unit, rank] = spot
                    shown.thumb[unit, rank] = thumbs.frame(max(int(spot[0]), 0), layout)
                    if grid.shape[0]:
                        here = grid.cells[:, 0] == max(int(spot[0]), 0)
                        share = (values.numpy()[here] / float(largest[unit])).clip(0, 1)
                        rows, columns = grid.cells[here, 1], grid.cells[here, 2]
                        shown.heat[unit, rank, rows, columns] = np.round(255 * share)
                    if units.kind == "head":
                        shown.mean[unit] += x[token, unit].float().cpu() / shape[1]
                at += 1
            advance(len(activations[units.name]))
    if close < _MOST * sum(map(len, wanted.values())):
        raise InputError("These are not the images, or not the model, that top= was made of: the scores differ.")
    return shown


@dataclass
class _Thumbs:
    """The small images of one item, a frame each, made when first needed."""

    run: Pass
    source: int
    thumbs: list[Image.Image]
    frames: list[Image.Image] | None = None

    def __post_init__(self) -> None:
        self.made: dict[int, int] = {}

    def frame(self, frame: int, layout: TokenLayout | None) -> int:
        """Return the number of a frame's small image."""
        if frame not in self.made:
            if self.frames is None:
                self.frames = self._read(layout)
            image = self.frames[min(frame, len(self.frames) - 1)]
            size = self.thumbs[0].size if self.thumbs else _fitted(image.size)
            smooth = Image.Resampling.LANCZOS if image.width >= size[0] else Image.Resampling.NEAREST
            self.made[frame] = len(self.thumbs)
            self.thumbs.append(image.convert("RGB").resize(size, smooth))
        return self.made[frame]

    def _read(self, layout: TokenLayout | None) -> list[Image.Image]:
        assert self.run.source.get is not None
        image = opened(self.run.source.get(self.source).image)
        if isinstance(image, Tensor) and self.run.preprocess is None:
            image = image[None]
        return frames_of(prepare(vision_of(self.run.model), image)[1], layout)


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    scale = SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
