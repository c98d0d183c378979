"""Attention of a whole model, collected and made small: scores in steps between each row's smallest and largest.

    code = 1 + round((score - low) / step), step = (high - low) / (steps - 1); 0 where a query may not attend

Patterns are the softmax of the decoded scores, so rows sum to 1. ``Stored`` states how far both are off.
"""

from __future__ import annotations

import base64
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from prisma_lens.heads import SIDE, layer_pattern, patterns_by_layer
from torch import Tensor

from prisma_core import HookedModel, HookPoint, InputError, NotApplicable, TokenLayout
from prisma_view.pack import BUDGET, grouped

STEPS = (4095, 1023, 255)
ROOM = 10_000_000
"""How many characters all layers may take in the page."""
SQUARE = "batch head query_pos key_pos"
WITHIN = re.compile(r"batch (\w+) head query_(\w+) key_\2")
"""Axes of attention within windows, within frames, or of one patch over frames: the second one says which."""


@dataclass(frozen=True)
class Map:
    """The attention of a layer: scores and patterns ``[window head query_pos key_pos]``, one window where it is global.

    Heads of attentions side by side follow each other.

    Attributes:
        scores: None where the pattern is not the softmax of the scores, or patches were taken together.
        within: what attention is within: a ``window``, a ``frame``, the ``patch`` of all frames; empty if it is global.
        grid: rows and columns of the tokens, which stand row by row; None where that is not known without a layout.
    """

    name: str
    pattern: Tensor
    scores: Tensor | None
    within: str = ""
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Stored:
    """Maps as the page holds them.

    Attributes:
        layers: of each, what its script tag holds (base64 of deflated bytes) and the facts to read it.
        steps: how many different values a row can have.
        pattern_error, score_error: the largest difference between what is stored and what the model computed.
    """

    layers: list[dict[str, Any]]
    steps: int
    pattern_error: float
    score_error: float


def collect(model: HookedModel, inputs: Sequence[Tensor], layers: Sequence[int] | None) -> list[Map]:
    """Return the attention of every layer, or of some, on the first input of a batch.

    Layers in which other tokens attend than are attended to, as where queries are pooled, are left out.

    Raises:
        NotApplicable: the model has no patterns of tokens among themselves.
        InputError: a layer that does not exist or has no pattern.
    """
    points, names = model.hook_points(), pattern_names(model)
    if layers is not None:
        wrong = [layer for layer in layers if not -len(names) <= layer < len(names)]
        if wrong or not layers:
            raise InputError(f"Expected layers of 0 to {len(names) - 1}, got {list(layers)}.")
        names = [names[layer] for layer in layers]
    scores = [[name.replace("hook_pattern", "hook_attn_scores") for name in sides] for sides in names]
    streams = [_stream(sides[0], points) for sides in names]
    with torch.no_grad():
        wanted = [*chain(*names), *(name for name in chain(*scores) if name in points), *filter(None, streams)]
        _, cache = model.run_with_cache(*inputs, names=wanted, output=False)
    maps = [
        _map(
            sides[0],
            layer_pattern(cache, sides)[0],
            layer_pattern(cache, others)[0] if all(other in cache for other in others) else None,
            within=within(points[sides[0]].axes) or "",
            rows_columns=None if stream is None else cache[stream].shape[1:3],
        )
        for sides, others, stream in zip(names, scores, streams, strict=True)
        if cache[sides[0]].shape[-1] == cache[sides[0]].shape[-2]
    ]
    if not maps:
        pooled = ", ".join(chain(*names))
        raise NotApplicable(f"The queries of {pooled} are pooled: other tokens attend than are attended to.")
    return maps


def pattern_names(model: HookedModel) -> list[list[str]]:
    """Return the hook points of patterns over all tokens, or over those of windows, by layer, some side by side.

    Raises:
        NotApplicable: the model has none.
    """
    layers = patterns_by_layer(model, lambda axes: within(axes) is not None)
    if not layers:
        raise NotApplicable(
            f"This model has no attention patterns [{SQUARE}], nor such patterns of windows, frames or patches. What "
            "it has is in model.hook_points(); prisma_view.patches draws any activation on the grid of its patches."
        )
    return layers


def within(axes: str) -> str | None:
    """Return what attention with these axes is within, empty if it is global; None if they are no such axes.

    >>> within("batch frame head query_pos key_pos")
    'frame'
    """
    found = WITHIN.fullmatch(axes)
    return found[1] if found else "" if axes == SQUARE else None


def _stream(name: str, points: Mapping[str, HookPoint]) -> str | None:
    """Return the hook point of what comes to a pattern's block, where it has rows and columns."""
    stream = re.sub(r"(blocks\.\d+\.).*", r"\1hook_resid_pre", name)
    return stream if stream in points and points[stream].axes.startswith("batch row column ") else None


def _map(
    name: str, pattern: Tensor, scores: Tensor | None, *, within: str, rows_columns: Sequence[int] | None = None
) -> Map:
    pattern = pattern.float().cpu()
    same = scores is not None and torch.allclose(scores.float().cpu().softmax(-1), pattern, atol=1e-4)
    scores = scores.float().cpu() if scores is not None and same else None
    if not within:
        pattern, scores = pattern[None], None if scores is None else scores[None]
    grid = (1, pattern.shape[-1]) if within == "patch" else None
    if rows_columns is not None:
        grid = window_grid(*rows_columns, windows=len(pattern), tokens=pattern.shape[-1])
    return Map(name, pattern, scores, within, grid)


def window_grid(rows: int, columns: int, *, windows: int, tokens: int) -> tuple[int, int] | None:
    """Return the rows and columns of a window: the squarest with which so many windows cover a grid; None if none do.

    >>> window_grid(14, 14, windows=4, tokens=49), window_grid(14, 21, windows=1, tokens=294)
    ((7, 7), (14, 21))
    """
    shapes = [(tall, tokens // tall) for tall in range(1, tokens + 1) if tokens % tall == 0]
    fitting = [(tall, wide) for tall, wide in shapes if math.ceil(rows / tall) * math.ceil(columns / wide) == windows]
    return min(fitting, key=lambda shape: abs(shape[0] - shape[1]), default=None)


def fitted(maps: list[Map], layout: TokenLayout | None) -> tuple[list[Map], TokenLayout | None, int]:
    """Return maps that fit on a page, their layout, and how many patches a side were taken together for it.

    Raises:
        InputError: they do not fit, and there is no layout to take patches together by.
    """
    size = sum(each.pattern.numel() for each in maps)
    if size <= BUDGET:
        return maps, layout, 1
    if layout is None or any(each.pattern.shape[-1] != layout.n_tokens for each in maps):
        raise InputError(f"{size:,} weights are more than the {BUDGET:,} that a page holds: choose fewer with layers=.")
    small, coarse, side = grouped(torch.cat([each.pattern[0] for each in maps])[None], layout)
    parts = small[0].split([each.pattern.shape[1] for each in maps])
    return [Map(one.name, part[None], None) for one, part in zip(maps, parts, strict=True)], coarse, side


def store(maps: list[Map]) -> Stored:
    """Return maps in as many steps as there is room for."""
    size = sum(each.pattern.numel() for each in maps)
    steps = next((n for n in STEPS if size * math.log2(n + 1) / 8 * 4 / 3 <= ROOM), STEPS[-1])
    stored = Stored([], steps, 0.0, 0.0)
    worst = np.zeros(2)
    for one in maps:
        codes, low, step = _coded(one, steps)
        worst = np.maximum(worst, _error(one, codes, low, step))
        planes = codes.astype("<u2").reshape(-1).view(np.uint8).reshape(-1, 2).T
        raw = low.astype("<f4").tobytes() + step.astype("<f4").tobytes() + planes.tobytes()
        windows, heads, tokens = one.pattern.shape[:3]
        stored.layers.append(
            {
                "data": base64.b64encode(zlib.compress(raw, 6)).decode(),
                "label": label_of(one.name),
                "windows": windows if one.within else 0,
                "within": one.within,
                "grid": one.grid,
                "heads": heads,
                "tokens": tokens,
                "scores": one.scores is not None,
            }
        )
    return Stored(stored.layers, steps, float(worst[0]), float(worst[1]))


def label_of(name: str) -> str:
    """Return what the page calls the layer of a pattern."""
    return SIDE.sub("", name).removesuffix(".hook_pattern").removesuffix(".attn").removeprefix("blocks.")


def _values(one: Map) -> np.ndarray:
    """Return scores with NaN where there is no attention at all."""
    pattern = one.pattern.numpy()
    values = np.log(np.maximum(pattern, 1e-38)) if one.scores is None else one.scores.numpy()
    return np.where((pattern > 0) & np.isfinite(values), values, np.nan)


def _coded(one: Map, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = _values(one)
    empty = np.isnan(values).all(-1, keepdims=True)
    filled = np.where(empty, 0.0, values)
    low, high = np.nanmin(filled, -1).astype(np.float32), np.nanmax(filled, -1).astype(np.float32)
    step = (high - low) / (steps - 1)
    codes = 1 + np.round((filled - low[..., None]) / np.where(step > 0, step, 1)[..., None])
    return np.where(np.isnan(values), 0, codes).clip(0, steps).astype(np.uint16), low, step.astype(np.float32)


def decoded(codes: np.ndarray, low: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores, minus infinity where there is no attention, and patterns, as the page computes them."""
    scores = np.where(codes > 0, low[..., None] + (codes - 1.0) * step[..., None], -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    return scores, weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)


def _error(one: Map, codes: np.ndarray, low: np.ndarray, step: np.ndarray) -> np.ndarray:
    scores, pattern = decoded(codes, low, step)
    seen = codes > 0
    off = np.abs(scores[seen] - _values(one)[seen]).max(initial=0) if one.scores is not None else 0.0
    return np.array([np.abs(pattern - one.pattern.numpy()).max(), off])
