"""Weights that hide nothing: every parameter drawn, every eps away from its default."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from prisma_core.plugin import checked


@checked
@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw every parameter, every floating buffer that upstream saves, and every norm's eps, in place.

    Zero biases, unit norms and equal eps hide mistakes. Buffers that upstream does not save (rope tables, position
    indices, the zero bias of keys in some models) are constants of the architecture and stay.

    Args:
        module: a copy that may be changed.
        generator: on the CPU; the same seed draws the same model everywhere.
    """
    saved = set(module.state_dict(keep_vars=True))
    for _, parameter in module.named_parameters():
        parameter.copy_(_drawn(parameter, generator))
    for name, buffer in module.named_buffers():
        if name in saved and buffer.is_floating_point():
            positive = name.endswith("running_var")
            buffer.copy_(_uniform(buffer, generator) if positive else _drawn(buffer, generator))
    _draw_eps(module, generator)
    return module


def _drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    values = tensor.detach()
    if values.ndim < 2 or values.shape[0] == values.numel():
        # Scales start at a constant other than zero and must not change sign often; biases start at zero.
        constant = bool((values != 0).all()) and bool((values == values.flatten()[0]).all())
        return _uniform(values, generator) if constant else 0.3 * _normal(values, generator)
    if values.shape[0] == 1:  # tokens and tables of positions
        return 0.5 * _normal(values, generator)
    # As wide as its inputs are many, so that activations keep their size and patterns are neither flat nor one-hot.
    return _normal(values, generator) / math.sqrt(values.numel() / values.shape[0])


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5).to(like)


def _draw_eps(module: nn.Module, generator: torch.Generator) -> None:
    drawn: dict[str, float] = {}
    for name, part in cast("Iterator[tuple[str, nn.Module]]", module.named_modules()):
        if not isinstance(vars(part).get("eps"), float):
            continue
        # Twins that run side by side in one block share an eps, as upstream's constructors give them one; so do the
        # norms of queries and keys, by whatever name: qn and kn, norm_q and norm_k, query_norm and key_norm.
        head, *rest = re.split(r"(?<=\.\d)(?=\.)|(?<=\.\d\d)(?=\.)", name, maxsplit=1)
        place = head + re.sub(r"\.\d+(?=\.|$)", "", rest[0] if rest else "")
        above, dot, own = place.rpartition(".")
        place = f"{above}{dot}{own.replace('query', 'key').replace('q', 'k')}"
        if place not in drawn:
            drawn[place] = 10 ** (-4 + 2 * float(torch.rand((), generator=generator)))
        vars(part)["eps"] = drawn[place]
