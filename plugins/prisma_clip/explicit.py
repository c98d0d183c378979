"""torch's multi-head attention, step by step: its fused functions show nothing of what happens inside.

The steps are used only to look inside. What a model returns is compared with what upstream's own functions return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def explicit_attention(upstream: nn.Module) -> Iterator[None]:
    """Make ``nn.MultiheadAttention`` compute step by step for the time of the scope.

    In each, ``linear`` is then called for queries, keys, values and the output, in this order, and ``softmax`` once.
    """
    modules = [module for module in upstream.modules() if type(module) is nn.MultiheadAttention]
    modules = [module for module in modules if "forward" not in vars(module)]  # a scope around this one did it
    for module in modules:
        module.forward = _stepwise(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _stepwise(module: nn.MultiheadAttention) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        width = (module.num_heads, module.head_dim)
        weights, biases = _projections(module)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, width).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        scores = q * module.head_dim**-0.5 @ k.transpose(-2, -1)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, -torch.inf)
            scores = scores + (attn_mask if attn_mask.ndim == 2 else attn_mask.view(scores.shape))
        z = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
        return F.linear(z, module.out_proj.weight, module.out_proj.bias), None

    return forward


def _projections(module: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor | None]]:
    bias = module.in_proj_bias
    biases: list[Tensor | None] = [None] * 3 if bias is None else list(bias.chunk(3))
    if module.in_proj_weight is not None:
        return list(module.in_proj_weight.chunk(3)), biases
    return [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight], biases
