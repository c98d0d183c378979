"""Positions that are added: which of upstream's rows a token takes, and how they follow other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prisma_core.plugin import Interpolation, Reader, TokenLayout, copy_module
from prisma_hf.canonical import bias, parts
from prisma_hf.canonical.names import TowerNames

Functions = Mapping[str, Callable[..., Tensor]]


def table(tower: Reader, names: TowerNames) -> Reader | Tensor | None:
    """Return the position embedding: a parameter, a table to look up, or None.

    Raises:
        UnsupportedArchitecture: there is no such attribute, not even None: positions are made on the way.
    """
    if not names.pos:
        return None
    part = parts.at(tower, names.pos)
    if isinstance(part, Reader):
        above, _, name = names.pos.rpartition(".")
        owner = parts.at(tower, above)
        rows = parts.READ.positions(owner, name).num_embeddings
        if (side := owner.get("num_grid_per_side")) is not None and side**2 != rows:
            raise owner.unsupported(f"num_grid_per_side={side!r} of {rows} positions")
    return part


def check(tower: Reader, names: TowerNames, layout: TokenLayout) -> bool:
    """Return whether there are positions, one for every token that takes one."""
    part = table(tower, names)
    if part is None:
        return False
    if names.looked_up and tower.config.patch_size != tower.embeddings.patch_size:
        raise tower.unsupported(f"config.patch_size={tower.config.patch_size!r}, by which patches are looked up")
    length = part.num_embeddings if isinstance(part, Reader) else part.shape[-2]
    expected = layout.n_tokens - (layout.registers if names.pos_without_registers else 0) + int(names.pos_and_first)
    if length != expected:
        raise tower.unsupported(f"{length} positions for {expected} tokens")
    if names.resize == "always" and layout.rows != layout.columns:
        raise tower.unsupported("positions that are interpolated from a square grid, which this image's is not")
    return True


def interpolation(tower: Reader, names: TowerNames, layout: TokenLayout) -> Interpolation | None:
    """Return how positions follow other sizes of image; None if the size is fixed."""
    if not names.pos and names.rope_sizes:
        return Interpolation()  # nothing is added: rotary tables are made for any grid
    if names.resampler is not None:
        how = parts.at(tower, names.resampler).expect(interpolation_mode="bilinear")
        corners = {"antialias": False, "align_corners": how.interpolation_align_corners}
        return Interpolation(mode="bilinear", **corners, in_float32=False, weights_in_float32=True)
    if table(tower, names) is None or names.resize == "never" or bias.tables(tower, "", names):
        return None
    # Upstream takes the root of the number of positions for a side of their grid.
    if layout.rows != layout.columns or (names.side and not isinstance(parts.at(tower, names.side), int)):
        return None
    return Interpolation(mode=names.mode, antialias=names.antialias, in_float32=names.resize_float32)


def rows(tower: Reader, at: str, names: TowerNames, layout: TokenLayout) -> tuple[str, Functions]:
    """Return the weight rows of positions, and their functions."""
    part = table(tower, names)
    if part is None:
        return "", {}
    source = f"{at}{names.pos}.weight" if isinstance(part, Reader) else f"{at}{names.pos}"
    how = "" if isinstance(part, Reader) or part.ndim == 2 else " : 1 n d -> n d"
    if names.looked_up and (ids := looked_up(tower, layout)) is not None:
        return f"{source}  ->  embed.pos_embed : {{positions}}\n", {"positions": lambda rows: rows[ids]}
    if names.pos_and_first:
        return f"{source}  ->  embed.pos_embed : {{positions}}\n", {"positions": lambda rows: rows[0, 1:] + rows[0, :1]}
    if names.pos_without_registers and layout.registers:
        return f"{source}  ->  embed.pos_embed : {{positions}}\n", {"positions": _with_registers(layout)}
    return f"{source}  ->  embed.pos_embed{how}\n", {}


def _with_registers(layout: TokenLayout) -> Callable[..., Tensor]:
    def made(rows: Tensor) -> Tensor:
        nothing = rows.new_zeros(layout.registers, rows.shape[-1])
        return torch.cat([rows[0, : layout.cls], nothing, rows[0, layout.cls :]])

    return made


@torch.no_grad()
def looked_up(tower: Reader, layout: TokenLayout) -> Tensor | None:
    """Return which row of its positions upstream gives each patch of an image of native size; None for each its own.

    Upstream computes them in floating point, and some grids come out uneven.
    """
    embeddings: Any = copy_module(tower.embeddings.module, hooks=False).to_empty(device="cpu").float()
    for tensor in (*embeddings.parameters(), *embeddings.buffers()):
        tensor.zero_()
    count = layout.rows * layout.columns
    embeddings.position_embedding.weight.copy_(torch.arange(count).float()[:, None])
    patch = embeddings.patch_embedding
    height, width = layout.rows * patch.kernel_size[0], layout.columns * patch.kernel_size[1]
    image, mask = torch.zeros(1, patch.in_channels, height, width), torch.ones(1, layout.rows, layout.columns).bool()
    ids = embeddings(image, mask)[0, :, 0].long()
    return None if torch.equal(ids, torch.arange(count)) else ids
