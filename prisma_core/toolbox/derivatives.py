"""Derivatives that torch's fused attention lacks: second ones, and those in forward mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from prisma_core.errors import InputError
from prisma_core.errors.arguments import in_transform, unwrapped
from prisma_core.toolbox.precision import AS_IT_IS

_functorch = cast("Any", torch)._C._functorch
ADVICE = (
    "Torch's fused attention has no second derivatives (create_graph=True). Run the forward pass in "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)."
)


def in_forward_mode() -> bool:
    """Return whether derivatives are being taken in forward mode (``jvp``), which no tensor shows."""
    return cast("Any", forward_ad)._current_level >= 0


def kernels(bias: Tensor | None = None) -> AbstractContextManager[object]:
    """Return a context in which attention has the derivatives that are being taken, where the forward pass can tell.

    It can tell forward mode, and in ``torch.func`` derivatives of derivatives, and those by a ``bias`` of the scores.
    """
    levels: list[Any] = []
    if not torch.compiler.is_compiling() and in_transform():
        levels = _functorch.get_interpreter_stack()
    nested = sum(level.key() == _functorch.TransformType.Grad for level in levels) > 1
    beyond = nested or in_forward_mode() or (bool(levels) and bias is not None and unwrapped(bias).requires_grad)
    return cast("AbstractContextManager[object]", sdpa_kernel(SDPBackend.MATH)) if beyond else AS_IT_IS


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return ``softmax(q . k * scale + bias) v`` by torch's fused kernel, with derivatives of any order.

    ``q``, ``k`` and ``v`` are ``[batch head pos d_head]``. Gradients that carry a graph (``create_graph=True``) are
    computed step by step.
    """
    with kernels(bias):
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if not z.requires_grad or torch.compiler.is_compiling() or cast("Any", torch).jit.is_tracing() or in_transform():
        return z
    return cast("Tensor", _WithGraph.apply(z, q, k, v, bias, scale))


class _WithGraph(torch.autograd.Function):
    """The identity on what the kernel made, past whose backward goes whatever gradient carries a graph."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        if grad is None or not torch.is_grad_enabled():
            return grad, None, None, None, None, None
        q, k, v, bias = ctx.saved_tensors
        with sdpa_kernel(SDPBackend.MATH):
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=ctx.scale).to(grad.dtype)
        needed = [x if x is not None and x.requires_grad else None for x in (q, k, v, bias)]
        grads = iter(torch.autograd.grad(z, [x for x in needed if x is not None], grad, create_graph=True))
        return None, *(None if x is None else next(grads) for x in needed), None

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Tensor:
        return grad_inputs[0].view_as(grad_inputs[0])


def explain_second(output: Tensor) -> None:
    """Have an error in words raised where second derivatives of an output meet a fused kernel of torch."""
    end = None if torch.compiler.is_compiling() else output.grad_fn
    if end is not None:
        end.register_prehook(_watch(end))


def _watch(end: Node) -> Callable[[tuple[Tensor, ...]], None]:
    def look(grads: tuple[Tensor, ...]) -> None:
        """Look for fused kernels in the graph, if the gradient gets a graph of its own."""
        todo, seen = [end] if torch.is_grad_enabled() else [], set[Node]()
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += [each for each, _ in node.next_functions if each is not None]
                if node.name().startswith("ScaledDotProduct"):
                    node.register_hook(refuse_next)

    def refuse_next(grads: tuple[Tensor | None, ...], _: tuple[Tensor, ...]) -> None:
        for grad in grads:
            if grad is not None and grad.grad_fn is not None and grad.grad_fn.name().endswith("NotImplemented"):
                grad.grad_fn.register_prehook(refuse)

    def refuse(grads: tuple[Tensor, ...]) -> None:
        raise InputError(ADVICE)

    return look
