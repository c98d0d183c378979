"""The fake device itself: it refuses to mix with the CPU, and computes what torch computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import DEVICE
from kinds import KINDS, drawn
from torch import Tensor

from prisma_core import InputError


def test_two_devices_do_not_mix(device: torch.device) -> None:
    there, here = torch.ones(2, 3).to(device), torch.ones(2, 3)
    assert there.device == DEVICE
    mixed: list[Callable[[], Tensor]] = [
        lambda: there + here,
        lambda: here @ there.T,
        lambda: here[there[0].long()],
        lambda: torch.cat([there, here]),
    ]
    for mixing in mixed:
        with pytest.raises(RuntimeError, match="same device"):
            mixing()
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()
    with pytest.raises(TypeError, match="to numpy"):
        np.asarray(there)
    assert torch.equal((there + 1).cpu(), here + 1)
    assert (there * torch.tensor(2.0)).device == DEVICE  # a number without axes may come along
    model = drawn(KINDS["positions resized"]).to(device)
    with pytest.raises(InputError, match=r"cuda:0.*cpu"):
        model(torch.zeros(1, 3, 8, 12))


def _set(index: Any, value: Any) -> Callable[[Tensor], Tensor]:
    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return write


BELOW_PYTHON: dict[str, Callable[[Tensor], Tensor]] = {
    "x[0] = number": _set(0, 1.5),
    "x[0, 1] = number": _set((0, 1), 2),
    "x[:] = number": _set(slice(None), 3),
    "x[list] = number": _set([0, 2], 4),
    "x[:, list] = tensor without axes": _set((slice(None), [0, 2]), torch.tensor(5.0)),
    "x[index] = number": _set(torch.tensor([1, 2]), 6),
    "x[mask] = number": lambda x: _set(x > 0, 7)(x),
    "x[list]": lambda x: x[[0, 2]],
    "x[:, list]": lambda x: x[:, [2, 0]],
    "where": lambda x: torch.where(x > 0, x, -1.0) + torch.where(x > 1, 0.25, x) + x.where(x > 2, 0.5),
    "new_tensor": lambda x: x * x.new_tensor([[1.5], [2.5], [3.5]]),
}


@pytest.mark.parametrize("way", BELOW_PYTHON)
def test_numbers_and_lists_go_to_the_device_as_torch_sends_them(way: str, device: torch.device) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    there = BELOW_PYTHON[way](x.to(device))
    assert there.device == DEVICE
    assert torch.equal(there.cpu(), BELOW_PYTHON[way](x))


def test_a_tensor_without_numbers_is_an_error(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"on meta.*aten::index"):
        torch.ones(3, 4).to(device)[True]
