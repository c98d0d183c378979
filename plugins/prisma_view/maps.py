"""Attention of a whole model, collected and made small: scores in steps between each row's smallest and largest.

    code = 1 + round((score - low) / step), step = (high - low) / (steps - 1); 0 where a query may not attend

Patterns are the softmax of the decoded scores, so rows sum to 1. ``Stored`` states how far both are off.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prisma_core import HookedModel, InputError, NotApplicable, TokenLayout
from prisma_core.plugin import layer_of
from prisma_view.pack import BUDGET, grouped

STEPS = (4095, 1023, 255)
ROOM = 10_000_000
"""How many characters all layers may take in the page."""
SQUARE = "batch head query_pos key_pos"
WINDOWED = "batch window head query_pos key_pos"


@dataclass(frozen=True)
class Map:
    """The attention of a layer: scores and patterns ``[window head query_pos key_pos]``, one window where it is global.

    Attributes:
        scores: None where the pattern is not the softmax of the scores, or patches were taken together.
    """

    name: str
    pattern: Tensor
    scores: Tensor | None
    windowed: bool


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

    Raises:
        NotApplicable: the model has no patterns over its tokens, or over the tokens of windows.
        InputError: a layer that does not exist or has no pattern.
    """
    points, names = model.hook_points(), pattern_names(model)
    if layers is not None:
        wrong = [layer for layer in layers if not -len(names) <= layer < len(names)]
        if wrong or not layers:
            raise InputError(f"Expected layers of 0 to {len(names) - 1}, got {list(layers)}.")
        names = [names[layer] for layer in layers]
    scores = [name.replace("hook_pattern", "hook_attn_scores") for name in names]
    with torch.no_grad():
        wanted = [*names, *(name for name in scores if name in points)]
        _, cache = model.run_with_cache(*inputs, names=wanted, output=False)
    return [
        _map(name, cache[name][0], cache[other][0] if other in cache else None, points[name].axes == WINDOWED)
        for name, other in zip(names, scores, strict=True)
    ]


def pattern_names(model: HookedModel) -> list[str]:
    """Return the hook points of patterns over all tokens, or over those of windows, by layer.

    Raises:
        NotApplicable: the model has none.
    """
    points = model.hook_points()
    names = [name for name in points if name.endswith("attn.hook_pattern") and layer_of(name) is not None]
    names = [name for name in names if points[name].axes in (SQUARE, WINDOWED)]
    if not names:
        raise NotApplicable(
            f"This model has no attention patterns [{SQUARE}] or [{WINDOWED}]. What it does have is in "
            "model.hook_points(); prisma_view.patches draws any activation on the grid of its patches."
        )
    return names


def _map(name: str, pattern: Tensor, scores: Tensor | None, windowed: bool) -> Map:
    pattern = pattern.float().cpu()
    same = scores is not None and torch.allclose(scores.float().cpu().softmax(-1), pattern, atol=1e-4)
    scores = scores.float().cpu() if scores is not None and same else None
    if not windowed:
        pattern, scores = pattern[None], None if scores is None else scores[None]
    return Map(name, pattern, scores, windowed)


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
    return [Map(one.name, part[None], None, False) for one, part in zip(maps, parts, strict=True)], coarse, side


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
                "label": _label(one.name),
                "windows": windows if one.windowed else 0,
                "heads": heads,
                "tokens": tokens,
                "scores": one.scores is not None,
            }
        )
    return Stored(stored.layers, steps, float(worst[0]), float(worst[1]))


def _label(name: str) -> str:
    return name.removesuffix(".attn.hook_pattern").removeprefix("blocks.")


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
