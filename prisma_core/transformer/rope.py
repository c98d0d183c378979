"""Rotary positions from tables of cos and sin."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Literal["interleaved", "half"]) -> Tensor:
    """Turn pairs of channels of queries or keys.

    Layout: ``x [batch pos head d_head]``; tables ``[pos 1 d_head]`` or ``[pos head d_head]``.
    Source: RoFormer (Su et al. 2021), equation 34.
    """
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).type_as(x)
