"""Arrays and attention patterns, made small enough to travel inside a page."""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from prisma_core import TokenLayout

BUDGET = 6_000_000
"""The most attention weights a page holds; above it, neighbouring patches are taken together."""

STEPS = (255, 15, 9, 6)
ROOM = 2_100_000
"""Upper bound of the characters that attention weights take, if fewer steps can keep it."""


def pack(array: Any) -> dict[str, Any]:
    """Return an array as JSON: its type, its shape, and its bytes, compressed and in base64."""
    array = np.ascontiguousarray(array)
    array = array.astype(array.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()
    return {"type": array.dtype.name, "shape": list(array.shape), "data": data}


def grouped(pattern: Tensor, layout: TokenLayout, budget: int = BUDGET) -> tuple[Tensor, TokenLayout, int]:
    """Return attention patterns, their layout, and how many patches a side were taken together to fit the budget.

    Keys of a group are summed and queries averaged, so rows still sum to 1.

    Layout: ``[layer head query_pos key_pos]``.
    """
    sides = range(1, 1 + max(layout.rows, layout.columns))
    side = next((side for side in sides if _size(pattern, layout, side) <= budget), sides[-1])
    if side == 1:
        return pattern, layout, 1
    coarse = layout.model_copy(
        update={"rows": math.ceil(layout.rows / side), "columns": math.ceil(layout.columns / side)}
    )
    rows, columns = torch.arange(layout.rows) // side, torch.arange(layout.columns) // side
    member = torch.arange(layout.n_tokens)
    places, groups = (each.grid(torch.arange(each.n_tokens), axis=0) for each in (layout, coarse))
    member[places] = groups[..., rows[:, None], columns]
    member = member.to(pattern.device)
    sums = torch.nn.functional.one_hot(member, coarse.n_tokens).to(pattern.dtype)
    means = sums / sums.sum(0)
    return rearrange(means, "q g -> g q") @ pattern @ sums, coarse, side


def _size(pattern: Tensor, layout: TokenLayout, side: int) -> int:
    tokens = layout.n_prefix + layout.frames * math.ceil(layout.rows / side) * math.ceil(layout.columns / side)
    return pattern.shape[0] * pattern.shape[1] * tokens**2


def pack_patterns(pattern: Tensor) -> dict[str, Any]:
    """Return patterns ``[layer head query_pos key_pos]`` as roots of shares of each row's largest weight.

    A weight is ``(step / steps)**2 * top``. There are as many steps as there is room for.
    """
    top = pattern.amax(-1)
    share = (pattern / top[..., None].clamp_min(1e-12)).clamp(0, 1).sqrt()
    packed: dict[str, Any] = {}
    for steps in STEPS if pattern.numel() <= BUDGET // 4 else STEPS[1:]:
        packed = {"steps": steps, "share": pack((share * steps).round().to(torch.uint8).cpu().numpy())}
        if len(packed["share"]["data"]) <= ROOM:
            break
    return {**packed, "top": pack(top.float().cpu().numpy())}
