"""Upstream modules that make a tensor of others, as functions a weight map can use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from prisma_core.plugin import Reader, copy_module


def own_tensors(module: Reader) -> list[str]:
    """Return the names of a module's parameters and buffers, in the order ``own_function`` takes them."""
    return [name for name, _ in [*module.module.named_parameters(), *module.module.named_buffers()]]


def own_function(module: Reader, method: str, **given: Any) -> Callable[..., Tensor]:
    """Return a method of an upstream module as a differentiable function of the module's tensors."""
    called = _Method(copy_module(module.module, hooks=False).eval(), method, given)
    names = [f"module.{name}" for name in own_tensors(module)]

    def function(*tensors: Tensor) -> Tensor:
        return functional_call(called, dict(zip(names, tensors, strict=True)), ())

    return function


class _Method(nn.Module):
    def __init__(self, module: nn.Module, method: str, given: dict[str, Any]):
        super().__init__()
        self.module = module
        self.method = method
        self.given = given

    def forward(self) -> Tensor:
        return getattr(self.module, self.method)(**self.given)
