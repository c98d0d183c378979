"""Direct logit attribution: which layer and which head wrote the logit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prisma_core import ActivationCache, HookedViT, ModelSpec

_NEEDED = ("hook_full_embed", "hook_pos_embed", "hook_ln_pre", "hook_attn_out", "hook_mlp_out")
_HEADS = ("hook_z", "attn.ln.hook_normalized", "hook_resid_post")
_SCALES = ("ln_final.hook_scale", "ln_pool.hook_scale")


class Attribution(NamedTuple):
    """What each component of the residual stream adds to some logits.

    ``values.sum(0) + constant`` is the logit itself.

    Attributes:
        values: ``[component batch class]``.
        labels: the components: ``embed``, ``0_attn_out``, ``0_mlp_out``, ...; or ``L0H0``, ..., ``remainder``.
        constant: what no component adds, the biases of the last norms and of the head: ``[batch class]``.
    """

    values: Tensor
    labels: tuple[str, ...]
    constant: Tensor


def attribution_names(model: HookedViT) -> list[str]:
    """Return what a cache must hold for ``logit_attribution`` and ``head_attribution``."""
    wanted = tuple(f".{name}" for name in (*_NEEDED, *_HEADS, *_SCALES))
    return [name for name in model.resolve(None) if f".{name}".endswith(wanted)]


def logit_attribution(model: HookedViT, cache: ActivationCache, classes: Sequence[int]) -> Attribution:
    """Return what the embedding and every layer's attention and MLP add to the logits of some classes.

    The scale of the final norms is frozen at what it was in this run, which makes the path from the stream to the
    logits a sum over components.

    Args:
        model: the model that made the cache.
        cache: with its batch axis; holds ``attribution_names(model)``, all tokens.
        classes: the logits wanted.

    Raises:
        NotApplicable: the model has no head, or pools by attention.
        UnknownName: the cache lacks activations; the message says which.
    """
    pos = _read_tokens(model)
    stack, labels = cache.decompose_resid(pos_slice=pos, return_labels=True)
    return _attributed(cache, stack, labels, classes, pos)


def head_attribution(model: HookedViT, cache: ActivationCache, classes: Sequence[int]) -> Attribution:
    """Return what every head adds to the logits of some classes; the last component is all the rest.

    Args:
        model, cache, classes: as in ``logit_attribution``.

    Raises:
        NotApplicable: as there, or a norm stands between the heads and the stream.
        UnknownName: the cache lacks activations; the message says which.
    """
    pos = _read_tokens(model)
    stack, labels = cache.stack_head_results(incl_remainder=True, pos_slice=pos, return_labels=True)
    return _attributed(cache, stack, labels, classes, pos)


def by_head(attribution: Attribution, n_layers: int) -> Tensor:
    """Return the heads of a ``head_attribution`` as ``[layer head batch class]``, without the remainder."""
    return attribution.values[:-1].unflatten(0, (n_layers, -1))


def _read_tokens(model: HookedViT) -> int | None:
    """The one token the head reads, or None for all: spares the memory of the others."""
    spec: object = model.spec
    return 0 if isinstance(spec, ModelSpec) and spec.pool.kind == "token" else None  # the cache refuses other models


def _attributed(
    cache: ActivationCache, stack: Tensor, labels: Sequence[str], classes: Sequence[int], pos: int | None
) -> Attribution:
    values = [cache.logit_attrs(stack, index, pos_slice=pos) for index in classes]
    constant = [cache.logit_constant(index) for index in classes]
    return Attribution(torch.stack(values, -1), tuple(labels), torch.stack(constant, -1))
