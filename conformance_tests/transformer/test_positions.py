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
