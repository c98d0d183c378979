"""The frozen path from the residual stream to a reading: what one unit of each direction at each token adds to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prisma_lens.readouts import Readout


def covectors(cache: Any, reading: Readout) -> Iterator[Tensor]:
    """Yield for each direction of a readout what the stream at its end is multiplied with: ``[batch pos d_model]``.

    Scales of norms, the pattern of attention that pools and the output's length are frozen as they were in the pass.
    The reading is then linear in the stream, and its gradient is the same everywhere: it is taken at zero. So this
    holds for every pooling and norm whose path is linear, and never needs a stack of components.

    Args:
        cache: of one tower, with the scales of its last norms.
        reading: what is read.

    Raises:
        NotApplicable: the stream or the output is no sum of components.
        UnknownName: the cache lacks activations.
    """
    stream = cache["attn_out", -1]
    with torch.enable_grad():
        x = torch.zeros_like(stream, requires_grad=True)
        outputs = cache.project_stack(x[None])[0]
        if reading.unit_length:
            outputs = outputs / lengths(cache)[..., None]
        along = (outputs @ reading.vectors.to(outputs).T).flatten(0, -2).sum(0)
        readings = along.unbind()
    for one in readings:  # outside of the scope, for whoever takes them must not build a graph
        yield torch.autograd.grad(one, x, retain_graph=True)[0]


def constant(cache: Any, reading: Readout) -> Tensor:
    """Return the part of a reading that no component of the stream adds, with the readout's bias: ``[batch class]``."""
    outputs = cache.logit_constant()
    if reading.unit_length:
        outputs = outputs / lengths(cache)[..., None]
    return outputs @ reading.vectors.to(outputs).T + reading.bias.to(outputs)


def lengths(cache: Any) -> Tensor:
    """Return the length of each output, before a dual encoder divides by it: ``[batch]``."""
    return cache["hook_logits"].norm(dim=-1)
