"""Activation functions of MLPs, by their names in specs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prisma_core.spec import Activation


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
}


def computes(module: nn.Module, name: Activation) -> bool:
    """Whether the forward of a module's class computes this function, tried at some points.

    A class says its function, except where the module holds one: ``module.act = torch.tanh``.
    """
    points = torch.linspace(-6, 6, 49, dtype=torch.float64, device="cpu")
    values: object = type(module).forward(module, points.clone())
    expected = ACTIVATIONS[name](points)
    return isinstance(values, Tensor) and values.shape == points.shape and torch.allclose(values, expected, 0, 1e-9)
