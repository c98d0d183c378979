"""Rotary positions: tables made by upstream's own module, and how they follow other sizes of image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from prisma_core.plugin import Reader, RopeGrid, RopeSpec, TokenLayout, copy_module
from prisma_hf.canonical import parts
from prisma_hf.canonical.names import TowerNames

Functions = Mapping[str, Callable[..., Tensor]]


def spec(tower: Reader, names: TowerNames) -> RopeSpec | None:
    """Return the facts of rotary positions; None where there are none."""
    if not names.rope:
        return None
    turning = parts.at(tower, names.rope)
    return RopeSpec(layout="half", in_float32=names.rope_in_float32, grid=_grid(tower, turning, names))


def _grid(tower: Reader, turning: Reader, names: TowerNames) -> RopeGrid | None:
    patch = tuple(parts.at(tower, names.proj).kernel_size)
    if names.rope_of == "image" and patch != _pair(turning.config.patch_size):
        raise turning.unsupported(f"rotary positions for patches of {turning.config.patch_size}, not {patch}")
    waves = _waves(turning.inv_freq)
    if names.rope_sizes == "radians":
        return RopeGrid(coordinates="radians", waves=waves)
    if names.rope_sizes == "index":
        half = len(waves) // 2
        fields = {"waves": waves[:half], "column_waves": waves[half:]} if names.rope_apart else {"waves": waves}
        return RopeGrid(coordinates="index", in_float32=True, angles_in_float32=True, **fields)
    return None


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _waves(tensor: Tensor) -> tuple[float, ...]:
    return () if tensor.is_meta else tuple(tensor.tolist())  # a model without data has no waves, as it has no weights


def rows(
    tower: Reader, at: str, names: TowerNames, layout: TokenLayout, size: tuple[int, int]
) -> tuple[str, Functions]:
    """Return the weight rows of rotary tables, and their functions.

    Args:
        size: of the image.
    """
    if not names.rope:
        return "", {}
    turning = copy_module(parts.at(tower, names.rope).module, hooks=False).eval()
    row, column = torch.meshgrid(torch.arange(layout.rows), torch.arange(layout.columns), indexing="ij")
    grid = torch.stack([row.flatten(), column.flatten()], dim=-1)

    def patches(frequencies: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        image = like.new_zeros(1, 1, *size)
        arguments = (image,) if names.rope_of == "image" else (like, grid.to(like.device))
        cos, sin = functional_call(turning, {"inv_freq": frequencies}, arguments)
        return cos.to(like.dtype), sin.to(like.dtype)

    def made(part: int) -> Callable[..., Tensor]:
        def tables(frequencies: Tensor, angles: Tensor | None = None) -> Tensor:
            like = frequencies if angles is None else angles
            turned = patches(frequencies, like)[part]
            still = like.new_zeros(layout.n_prefix, turned.shape[-1])
            row_angles = still if angles is None else torch.cat([angles, angles], dim=-1)
            return torch.cat([row_angles.sin() if part else row_angles.cos(), turned])[:, None]

        return tables

    names_of_tensors = [f"{at}{names.rope}.inv_freq", *([f"{at}{names.rope_cls}"] if names.rope_cls else [])]
    table = f"""
        [{", ".join(names_of_tensors)}]  ->  rope_cos : {{cos}}
        [{", ".join(names_of_tensors)}]  ->  rope_sin : {{sin}}
        ignore {at}{names.rope}.original_inv_freq : the frequencies, kept twice
    """
    return table, {"cos": made(0), "sin": made(1)}
