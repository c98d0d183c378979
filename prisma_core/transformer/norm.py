"""Norms with hook points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.hooks.point import HookPoint
from prisma_core.spec import NormSpec


class Norm(nn.Module):
    """Layer norm or root mean square norm over the last axis.

    ``hook_scale`` is what the (centred) input is divided by; editing it, or asking for it where gradients flow,
    replaces the fused kernel by the explicit one. ``hook_normalized`` is the output, weight and bias applied.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, spec: NormSpec, width: int, axes: str = "batch pos d_model"):
        super().__init__()
        self.spec = spec
        self.width = width
        self.weight = nn.Parameter(torch.ones(width))
        if spec.kind == "ln":
            self.bias = nn.Parameter(torch.zeros(width))
        else:
            self.register_parameter("bias", None)
        *outer, _ = axes.split()
        centred = "x - mean(x)" if spec.kind == "ln" else "x"
        self.hook_scale = HookPoint(" ".join([*outer, "1"]), f"sqrt(mean(({centred})^2) + eps)")
        affine = "weight + bias" if spec.kind == "ln" else "weight"
        self.hook_normalized = HookPoint(axes, f"({centred}) / scale * {affine}")

    def forward(self, x: Float[Tensor, "*outer width"]) -> Float[Tensor, "*outer width"]:
        if not self.hook_scale.wanted:
            return self.hook_normalized(self.fused(x))
        if self.hook_scale.edited or x.requires_grad:
            return self.hook_normalized(self._explicit(x))
        return self.hook_normalized(self._read(x))

    def fused(self, x: Float[Tensor, "*outer width"]) -> Float[Tensor, "*outer width"]:
        """Return the norm of ``x`` past all hook points."""
        given, weight, bias = self._operands(x)
        if self.spec.kind == "ln":
            return F.layer_norm(given, (self.width,), weight, bias, self.spec.eps).type_as(x)
        if self.spec.in_float32:
            return self._weighted(given * self._inverse(given), x)
        return F.rms_norm(x, (self.width,), weight, self.spec.eps)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.spec.in_float32:
            return x, self.weight, self.bias
        return x.float(), self.weight.float(), None if self.bias is None else self.bias.float()

    def _weighted(self, scaled: Tensor, x: Tensor) -> Tensor:
        _, weight, bias = self._operands(x)
        if not self.spec.weight_in_float32:
            scaled, weight = scaled.type_as(x), self.weight
        scaled = scaled * weight
        return (scaled if bias is None else scaled + bias).type_as(x)

    def _inverse(self, centred: Tensor) -> Tensor:
        return torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.spec.eps)

    def _read(self, x: Tensor) -> Tensor:
        """Show the scale without changing the kernel: no hook can change it, no gradient is asked for."""
        given, weight, bias = self._operands(x)
        if self.spec.kind == "ln":
            normalized, _, inverse = torch.native_layer_norm(given, [self.width], weight, bias, self.spec.eps)
            self.hook_scale(inverse.type_as(x).reciprocal())
            return normalized.type_as(x)
        self.hook_scale(self._inverse(given).type_as(x).reciprocal())
        return self.fused(x)

    def _explicit(self, x: Tensor) -> Tensor:
        given, _, _ = self._operands(x)
        centred = given - given.mean(-1, keepdim=True) if self.spec.kind == "ln" else given
        scale = self.hook_scale(self._inverse(centred).type_as(x).reciprocal())
        return self._weighted(centred * scale.reciprocal().type_as(given), x)


def norm_or_identity(spec: NormSpec | None, width: int, axes: str = "batch pos d_model") -> Norm | nn.Identity:
    """Return the norm, or a module that passes its input on where the spec has none."""
    return nn.Identity() if spec is None else Norm(spec, width, axes)


class Scale(nn.Module):
    """A learned factor per channel (layer scale)."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*outer width"]) -> Float[Tensor, "*outer width"]:
        return x * self.gamma
