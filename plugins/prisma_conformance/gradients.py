"""Gradients through a weight map."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from prisma_core.plugin import WeightMap


def pull_back(table: WeightMap, upstream: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pull gradients by the canonical tensors of a loss back to gradients by upstream's tensors."""
    leaves = {
        name: tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for name, tensor in upstream.items()
    }
    tensors = table.forward(leaves, {name: tensor.shape for name, tensor in gradients.items()})
    names = [name for name in gradients if tensors[name].requires_grad]
    inputs = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(
        [tensors[name] for name in names],
        list(inputs.values()),
        [gradients[name].to(tensors[name]) for name in names],
        allow_unused=True,
    )
    pairs = zip(inputs, cast("tuple[Tensor | None, ...]", grads), strict=True)
    return {name: grad for name, grad in pairs if grad is not None}
