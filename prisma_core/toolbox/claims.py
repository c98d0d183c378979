"""Checks of what a configuration claims, before a model is made of it: against a file's tensors, or this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from torch import Tensor, nn

from prisma_core.errors import LoadError
from prisma_core.files.texts import leaves

LAYERS = 512  # of a model whose weights are not there to be counted
LABELS = 1 << 20
_COUNT = re.compile(r"(?:.*_)?(?:layers?|depths?|blocks|labels)")


def check_layers(config: object, held: Mapping[str, Tensor] | None, where: object) -> None:
    """Refuse more layers than a file has tensors, and labels without end: these are made one by one.

    Args:
        config: a configuration, as read from JSON.
        held: the file's tensors, which may lie on the meta device; None for a model without weights.
        where: the configuration's file, for messages.

    Raises:
        LoadError: with the field.
    """
    for keys, n in leaves(config):
        name = keys[-1] if keys else ""
        if not (isinstance(n, int) and _COUNT.fullmatch(name)):
            continue
        labels = name.endswith("labels")
        most = LABELS if labels else max(LAYERS, len(held or ()))
        if n > most:
            instead = f"its file has {len(held)} tensors" if held and not labels else f"at most {most} are made"
            raise LoadError(f"{where} says {name}={str(n)[:30]}, and {instead}.")


def check_claims(model: nn.Module, held: Mapping[str, Tensor] | None, where: object) -> None:
    """Refuse a model that is far larger than its file, or than this machine's memory where it has no file.

    Args:
        model: made on the meta device.
        held: the file's tensors, which may lie on the meta device; None for weights that are to be drawn.
        where: the configuration's file, for messages.

    Raises:
        LoadError: with both sizes.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if held is not None:
        n, there = sum(tensor.numel() for tensor in tensors), sum(tensor.numel() for tensor in held.values())
        if n > 4 * there + (1 << 20):  # some tensors are computed, such as masks
            raise LoadError(f"{where} describes a model of {n:,} numbers, and its file holds {there:,}.")
    size, memory = sum(tensor.nbytes for tensor in tensors), _memory()
    if size > memory:
        raise LoadError(f"{where} describes a model of {size / 2**30:.0f} GiB; this machine has {memory / 2**30:.0f}.")


def _memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return float("inf")
