"""Scopes in which an upstream model shows its attention: for the adapter's ``explicit``.

They change how upstream computes, for as long as the scope is open, so that patterns pass by where they can be read.
What a model returns is compared outside of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def switched(things: Iterable[object], attribute: str, value: object) -> Generator[None]:
    """Set an attribute of some modules or configurations, past any setter, and put back what was there."""
    before = [(vars(thing), vars(thing)[attribute]) for thing in things if attribute in vars(thing)]
    for fields, _ in before:
        fields[attribute] = value
    try:
        yield
    finally:
        for fields, was in before:
            fields[attribute] = was


@contextmanager
def eager_attention(upstream: nn.Module) -> Generator[None]:
    """Make a model of transformers compute attention step by step: its configurations say how.

    The softmax keeps float64: the explicit form, and that alone, would round scores to float32.
    """
    with switched(_configurations(upstream), "_attn_implementation_internal", "eager"), float64_softmax():
        yield


def _configurations(upstream: nn.Module) -> list[object]:
    """Return every configuration in a tree of modules once, those inside others too."""
    configs: dict[int, object] = {}
    for module in upstream.modules():
        config: object = getattr(module, "config", None)
        for one in (config, *(vars(config).values() if hasattr(config, "__dict__") else ())):
            if hasattr(one, "__dict__") and "_attn_implementation_internal" in vars(one):
                configs[id(one)] = one
    return list(configs.values())


class float64_softmax(TorchFunctionMode):  # used as a scope
    """Keep a softmax of float64 in float64 where upstream asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        rounds = getattr(func, "__name__", "") == "softmax" and kwargs.get("dtype") is torch.float32
        if rounds and args[0].dtype == torch.float64:
            del kwargs["dtype"]
        return func(*args, **kwargs)


@contextmanager
def multihead_attention(upstream: nn.Module) -> Generator[None]:
    """Make torch's ``nn.MultiheadAttention`` compute step by step: its fused functions show nothing of their inside.

    In each, ``linear`` is then called for queries, keys, values and the output, in this order, and ``softmax`` once;
    the batch comes first there, wherever the module has it.
    """
    with ExitStack() as stack:
        for module in upstream.modules():
            # A scope around this one may have done it.
            if type(module) is nn.MultiheadAttention and "forward" not in vars(module):
                module.forward = _stepwise(module)
                stack.callback(vars(module).pop, "forward")
        yield


def _stepwise(module: Any) -> Callable[..., tuple[Tensor, None]]:
    def turned(x: Tensor) -> Tensor:
        return x if module.batch_first else x.transpose(0, 1)

    def forward(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: object
    ) -> tuple[Tensor, None]:
        heads: list[int] = [module.num_heads, module.head_dim]
        weights, biases = _projections(module)
        projections = zip(map(turned, (query, key, value)), weights, biases, strict=True)
        inputs = [F.linear(x, weight, bias) for x, weight, bias in projections]
        q, k, v = (x.view(*x.shape[:2], *heads).transpose(1, 2) for x in inputs)
        scores = q * module.head_dim**-0.5 @ k.transpose(-2, -1)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, -torch.inf)
            scores = scores + (attn_mask if attn_mask.ndim == 2 else attn_mask.view(scores.shape))
        z = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
        return turned(F.linear(z, module.out_proj.weight, module.out_proj.bias)), None

    return forward


def _projections(module: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    bias = cast("Tensor | None", module.in_proj_bias)
    biases: list[Tensor | None] = [None] * 3 if bias is None else list(bias.chunk(3))
    if (packed := cast("Tensor | None", module.in_proj_weight)) is not None:
        return list(packed.chunk(3)), biases
    return [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight], biases
