"""Norms with hook points."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.hooks.point import HookPoint
from prisma_core.spec import NormSpec
from prisma_core.toolbox.derivatives import in_forward_mode
from prisma_core.toolbox.precision import HALF, show, widened
from prisma_core.transformer.recipes import computed


class Norm(nn.Module):
    """Layer norm or root mean square norm over the last axis.

    ``hook_scale`` is what the (centred) input is divided by; editing it, or asking for it where gradients flow,
    replaces the fused kernel by the explicit one. ``hook_normalized`` is the output, weight and bias applied. Half
    dtypes are computed in float32, as the fused kernel does.
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
        value = None
        if self.hook_scale.wanted:
            if self.hook_scale.edited or x.requires_grad or in_forward_mode():
                return self._explicit(x)
            value = self._read(x)
        return computed(self.hook_normalized, partial(_fused, self.spec), x, self.weight, self.bias, value=value)

    def fused(self, x: Float[Tensor, "*outer width"]) -> Float[Tensor, "*outer width"]:
        """Return the norm of ``x`` past all hook points."""
        return _fused(self.spec, x, self.weight, self.bias)

    def linear(self, x: Float[Tensor, " *x width"], scale: Float[Tensor, " *scale 1"]) -> Float[Tensor, " *both width"]:
        """Return the norm of ``x`` with a given scale and no bias, which is linear in ``x``."""
        return (self.centred(widened(x)) / self.divisor(scale) * self.weight.to(x)).type_as(x)

    def centred(self, x: Tensor) -> Tensor:
        """Return ``x`` less its mean over the last axis, where this norm takes that out."""
        return _centred(self.spec, x)

    def divisor(self, scale: Tensor) -> Tensor:
        """Return a scale as a hook point showed it: in float32, and where a half dtype rounded it to 0, sqrt(eps)."""
        return scale if scale.dtype not in HALF else scale.float().where(scale != 0, self.spec.eps**0.5)

    def _shown(self, inverse: Tensor, x: Tensor) -> Tensor:
        """Return the scale of ``x`` after its hook point."""
        return show(self.hook_scale, widened(inverse).reciprocal(), x.dtype)

    def _read(self, x: Tensor) -> Tensor:
        """Show the scale without changing the kernel: no hook can change it, no gradient is asked for."""
        spec = self.spec
        operand, width, weight, bias = _operands(spec, x, self.weight, self.bias)
        if spec.kind == "ln" and operand.dtype not in HALF:
            normalized, _, inverse = torch.native_layer_norm(operand, width, weight, bias, spec.eps)
            self._shown(inverse, x)
            return normalized.type_as(x)
        self._shown(_inverse(spec, self.centred(widened(operand))), x)
        return self.fused(x)

    def _explicit(self, x: Tensor) -> Tensor:
        centred = self.centred(_wide(self.spec, x))
        scale = self._shown(_inverse(self.spec, centred), x)
        value = _divided(self.spec, x, scale, self.weight, self.bias, centred)
        divided = partial(_divided, self.spec)
        return computed(self.hook_normalized, divided, x, scale, self.weight, self.bias, value=value)


# ---------------------------------------------- of a spec, which is frozen: recipes of activations must not change


def _fused(spec: NormSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not spec.weight_in_float32:  # no kernel of torch's
        wide = x.float()
        return _weighted(spec, wide * _inverse(spec, wide), x, weight, bias)
    wide, width, weight, bias = _operands(spec, x, weight, bias)
    ln = spec.kind == "ln"
    y = F.layer_norm(wide, width, weight, bias, spec.eps) if ln else F.rms_norm(wide, width, weight, spec.eps)
    return y if y.dtype == x.dtype else y.type_as(x)


def _divided(
    spec: NormSpec, x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, centred: Tensor | None = None
) -> Tensor:
    centred = _centred(spec, _wide(spec, x)) if centred is None else centred
    return _weighted(spec, centred * scale.reciprocal().type_as(centred), x, weight, bias)


def _operands(
    spec: NormSpec, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, torch.Size, Tensor, Tensor | None]:
    if not spec.in_float32:
        return x, weight.shape, weight, bias
    return x.float(), weight.shape, weight.float(), None if bias is None else bias.float()


def _weighted(spec: NormSpec, scaled: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not spec.weight_in_float32:
        return (scaled.type_as(x) * weight).type_as(x)
    scaled = scaled * weight.to(scaled)
    return (scaled if bias is None else scaled + bias.to(scaled)).type_as(x)


def _centred(spec: NormSpec, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) if spec.kind == "ln" else x


def _inverse(spec: NormSpec, centred: Tensor) -> Tensor:
    return torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + spec.eps)


def _wide(spec: NormSpec, x: Tensor) -> Tensor:
    return x.float() if spec.in_float32 else widened(x)


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
