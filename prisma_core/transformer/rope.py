"""Rotary positions from tables of cos and sin."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prisma_core.errors.arguments import LARGEST, choice, expect, number, tensor
from prisma_core.spec import RopeCount, RopeGrid

Layout = Literal["interleaved", "half"]


def rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, " pos #head d_head"],
    sin: Float[Tensor, " pos #head d_head"],
    layout: Layout,
    in_float32: bool = False,
) -> Float[Tensor, "batch pos head d_head"]:
    """Turn pairs of channels of queries or keys; ``in_float32``: whatever they are, and back to that.

    Layout: ``x [batch pos head d_head]``; tables ``[pos 1 d_head]`` or ``[pos head d_head]``.
    Source: RoFormer (Su et al. 2021), equation 34.
    """
    if in_float32:
        return rotate(x.float(), cos.float(), sin.float(), layout).type_as(x)
    if layout == "half":
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).type_as(x)


def grid_tables(
    spec: RopeGrid, layout: Layout, rows: int, columns: int, n_prefix: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cos and sin ``[pos 1 d_head]`` of the dtype of ``like`` for a grid of patches, prefix rows the identity.

    Source: timm's RotaryEmbeddingCat and RotaryEmbeddingDinoV3: coordinates in float32, angles in the model's dtype.
    Pixtral's, with waves of its own for each axis, takes the angles in float32.
    """
    wide = torch.float64 if like.dtype == torch.float64 and not spec.angles_in_float32 else torch.float32
    row, column = _coordinates(spec, rows, columns, like.device)
    axes = [row[:, None].expand(rows, columns), column[None, :].expand(rows, columns)]
    both = [spec.waves, spec.column_waves or spec.waves]
    turn = -1 if spec.column_first else 1
    grid = torch.stack(axes[::turn], dim=-1).flatten(0, 1)
    waves = torch.tensor(both[::turn], dtype=wide, device=like.device)  # [axis wave]
    if spec.coordinates == "centred":
        angles = 2 * math.pi * (2.0 * grid - 1.0).to(wide)[..., None] / waves
    elif spec.coordinates == "radians":
        angles = 2 * math.pi * (2.0 * grid - 1.0)[..., None] * waves
    else:
        angles = grid.to(wide)[..., None] * waves
    cos, sin = (_spread(table.flatten(1), layout)[:, None] for table in (angles.cos(), angles.sin()))
    if spec.in_float32:
        cos, sin = cos.float(), sin.float()
    one = cos.new_ones(n_prefix, *cos.shape[1:])
    return torch.cat([one, cos]).to(like.dtype), torch.cat([torch.zeros_like(one), sin]).to(like.dtype)


def count_tables(
    spec: RopeCount, layout: Layout, n_patches: int, n_prefix: int, d_head: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cos and sin ``[pos 1 d_head]`` for the patches of a video, prefix rows the identity.

    Args:
        like: gives dtype and device.

    Source: transformers' VJEPA2RopeAttention and rotate_queries_or_keys, with the same operations in the same order.
    """
    expect(spec, RopeCount, "a RopeCount")
    choice(layout, ("half", "interleaved"), "the layout")
    tensor(like, "what gives dtype and device")
    for value, what, low in (
        (n_patches, "n_patches", 1),
        (n_prefix, "n_prefix", 0),
        (d_head, "d_head", 6 * spec.pairs),
    ):
        number(value, what, low, LARGEST)
    index = torch.arange(n_patches, device=like.device)
    in_frame = index % (spec.rows * spec.columns)
    axes = (index // (spec.rows * spec.columns), in_frame // spec.columns, in_frame % spec.columns)
    omega = torch.arange(spec.pairs, dtype=like.dtype, device=like.device)
    omega = 1.0 / spec.theta ** (omega / spec.pairs)
    cos, sin = like.new_ones(n_prefix + n_patches, 1, d_head), like.new_zeros(n_prefix + n_patches, 1, d_head)
    for axis, coordinate in enumerate(axes):
        angles = coordinate[:, None] * omega
        turned = slice(axis * 2 * spec.pairs, (axis + 1) * 2 * spec.pairs)
        for table, values in ((cos, angles.cos()), (sin, angles.sin())):
            table[n_prefix:, 0, turned] = _spread(values, "half" if spec.tiled else layout)
    return cos, sin


def _spread(pairs: Tensor, layout: Layout) -> Tensor:
    return torch.cat([pairs, pairs], dim=-1) if layout == "half" else pairs.repeat_interleave(2, -1)


def _coordinates(spec: RopeGrid, rows: int, columns: int, device: torch.device) -> list[Tensor]:
    sides = (rows, columns)
    over = {"separate": sides, "min": (min(sides),) * 2, "max": (max(sides),) * 2}[spec.normalize]
    centred = spec.coordinates != "index"
    first = 0.5 if centred else 0.0
    axes = [torch.arange(first, side, dtype=torch.float32, device=device) + spec.offset for side in sides]
    if centred:
        axes = [axis / length for axis, length in zip(axes, over, strict=True)]
    if spec.reference is not None:
        axes = [axis / side * length for axis, side, length in zip(axes, sides, spec.reference, strict=True)]
    return axes
