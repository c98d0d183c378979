"""Activation functions and input normalisations of sparse coders, each to the letter of the library it comes from."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

Activation: TypeAlias = Literal[
    "relu", "tanh-relu", "topk", "topk-signed", "topk-abs", "jumprelu", "jump-signed", "groupmax"
]  # fmt: skip
"""``topk`` keeps the k largest, then takes their relu; ``jumprelu`` is relu(h) where h > threshold; the signed ones
take no relu; ``topk-abs`` keeps the k largest by magnitude, with their signs; ``groupmax`` keeps the largest of each of
k groups of neighbours, after relu."""

Normalize: TypeAlias = Literal["none", "layer_norm", "constant_norm_rescale", "standardize"]
"""``layer_norm``: (x - mean) / (deviation + 1e-5) over the last axis, the deviation with n - 1;
``constant_norm_rescale``: x sqrt(d) / |x|; ``standardize``: (x - input_mean) / input_scale, by fixed tensors."""


def activate(h: Tensor, kind: Activation, k: int | None, threshold: Tensor | None) -> Tensor:
    """Return features ``[... feature]`` of pre-activations of the same shape.

    Args:
        k: of the kinds of ``topk`` and of ``groupmax``.
        threshold: of ``jumprelu`` and ``jump-signed``: a number, or one for each feature.
    """
    if kind == "relu":
        return torch.relu(h)
    if kind == "tanh-relu":
        return torch.tanh(torch.relu(h))
    if kind in ("jumprelu", "jump-signed"):
        assert threshold is not None
        return (torch.relu(h) if kind == "jumprelu" else h) * (h > threshold)
    assert k is not None
    if kind == "groupmax":
        groups = torch.relu(h).unflatten(-1, (k, -1))
        values, places = groups.max(-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, places, values).flatten(-2)
    if kind == "topk-abs":
        places = h.abs().topk(k, dim=-1, sorted=False).indices
        return torch.zeros_like(h).scatter(-1, places, h.gather(-1, places))
    values, places = h.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(h).scatter(-1, places, values if kind == "topk-signed" else torch.relu(values))


class Statistics(NamedTuple):
    """The numbers that undo a normalisation: ``y * scale + mean``, or ``y / divisor``."""

    mean: Tensor | None = None
    scale: Tensor | None = None
    divisor: Tensor | None = None

    def restore(self, y: Tensor) -> Tensor:
        """Return a normalised output in the units of the input."""
        y = y if self.scale is None else y * self.scale
        y = y if self.divisor is None else y / self.divisor
        return y if self.mean is None else y + self.mean


def normalized(x: Tensor, kind: Normalize, mean: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Statistics]:
    """Return an input ``[... d_in]`` as the encoder reads it, with what undoes it.

    Args:
        mean, scale: of ``standardize``.
    """
    if kind == "layer_norm":
        mu = x.mean(-1, keepdim=True)
        centred = x - mu
        deviation = centred.std(-1, keepdim=True)
        return centred / (deviation + 1e-5), Statistics(mu, deviation)
    if kind == "constant_norm_rescale":
        coefficient = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        return x * coefficient, Statistics(divisor=coefficient)
    if kind == "standardize":
        y = x if mean is None else x - mean
        return y if scale is None else y / scale, Statistics(mean, scale)
    return x, Statistics()
