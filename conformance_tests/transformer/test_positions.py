"""Positions at other sizes: each way they are resized, against torch's own function."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from prisma_core.spec import Interpolation
from prisma_core.transformer.embed import resize_positions

NATIVE = (4, 6)
SIZES = [(4, 6), (7, 9), (2, 3), (1, 13), (9, 2)]
WEIGHTS = {
    "four around a patch": Interpolation(
        mode="bilinear", antialias=False, in_float32=False, weights_in_float32=True
    ),
    "four, corners on corners": Interpolation(
        mode="bilinear", antialias=False, align_corners=True, in_float32=False, weights_in_float32=True
    ),
    "all, antialiased": Interpolation(mode="bilinear", weights_in_float32=True),
}  # fmt: skip


def rows() -> Tensor:
    return torch.randn(24, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("way", WEIGHTS)
def test_sums_by_weights_are_torchs_interpolation(way: str, size: tuple[int, int]) -> None:
    how = WEIGHTS[way]
    resized = resize_positions(rows(), how, NATIVE, size)
    grid = rows().T.reshape(1, 10, *NATIVE)
    expected = torch.nn.functional.interpolate(
        grid, size, mode="bilinear", antialias=how.antialias, align_corners=how.align_corners
    )
    torch.testing.assert_close(resized.double(), expected[0].flatten(1).T, rtol=0, atol=3e-6)
    assert resized.dtype == (torch.float32 if how.in_float32 else torch.float64)


OTHER = [{"mode": "bicubic"}, {"in_float32": False}, {"antialias": False}, {"align_corners": True}, {"square": True}]


@pytest.mark.parametrize("fact", OTHER, ids=str)
def test_sums_by_weights_that_nothing_computes(fact: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="weights_in_float32 goes with mode='bilinear'"):
        Interpolation.model_validate({"mode": "bilinear", "weights_in_float32": True} | fact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_one_column_of_patches_is_one_row_turned(length: int, antialias: bool, mode: str, dtype: torch.dtype) -> None:
    """For grids in some orders of memory, torch's own kernel repeats the first row there."""
    how = Interpolation(mode=mode, antialias=antialias, in_float32=dtype == torch.float32)
    table = rows().to(dtype)
    turned = table.reshape(4, 6, 10).transpose(0, 1).flatten(0, 1)
    column, row = resize_positions(table, how, (4, 6), (length, 1)), resize_positions(turned, how, (6, 4), (1, length))
    torch.testing.assert_close(column, row, rtol=0, atol=1e-6)
