"""Direct attribution: which layer, head and token wrote a logit, or the similarity of an image and a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from prisma_core import ActivationCache, HookedDual, HookedModel, HookedText, HookedViT, ModelSpec, NotApplicable

Classes: TypeAlias = "int | str | Sequence[int | str] | Tensor"

_NEEDED = ("hook_full_embed", "hook_pos_embed", "hook_ln_pre", "hook_attn_out", "hook_mlp_out")
_HEADS = ("hook_z", "attn.ln.hook_normalized", "hook_resid_post")
_SCALES = ("ln_final.hook_scale", "ln_pool.hook_scale", "pool.attn.hook_pattern")
_PAIR = ("vision.hook_logits", "text.hook_logits", "hook_image_embed", "hook_text_embed")
_SOURCES = ("hook_pattern", "hook_v")


class Attribution(NamedTuple):
    """Contributions of the components of the residual stream to some logits.

    ``values.sum(0) + constant`` is the logit itself. No gradient flows through them.

    Attributes:
        values: ``[component batch class]``.
        labels: the components: ``embed``, ``0_attn_out``, ``0_mlp_out``, ...; or ``L0H0``, ..., ``remainder``.
        constant: what no component adds, the biases of the last norms and of the head: ``[batch class]``.
    """

    values: Tensor
    labels: tuple[str, ...]
    constant: Tensor


def attribution_names(model: HookedModel, *, sources: bool = False) -> list[str]:
    """Return what a cache must hold for the attributions of this model.

    Args:
        sources: for ``source_attribution`` as well.
    """
    ends = (*_NEEDED, *_HEADS, *_SCALES, *(_SOURCES if sources else ()))
    wanted = tuple(f".{name}" for name in (*ends, *(_PAIR if isinstance(model, HookedDual) else ())))
    return [name for name in model.resolve(None) if f".{name}".endswith(wanted)]


@torch.no_grad()
def logit_attribution(model: HookedViT | HookedText, cache: ActivationCache, classes: Classes) -> Attribution:
    """Return what the embedding and every layer's attention and MLP add to the logits of some classes.

    The scale of the final norms is frozen at what it was in this run, and so is the pattern of attention that pools,
    which makes the path from the stream to the logits a sum over components.

    Args:
        model: the model that made the cache.
        cache: with its batch axis; holds ``attribution_names(model)``, all tokens.
        classes: one class or several, as indices or labels; or directions in the model's output, such as texts' vectors
            for a vision tower: floating point numbers ``[class d_embed]``.

    Raises:
        NotApplicable: the model has no head, or its stream or its output is no sum; the message says why.
        UnknownName: the cache lacks activations; the message says which.
    """
    pos = _read_token(model)
    stack, labels = cache.decompose_resid(pos_slice=pos, return_labels=True)
    return _attributed(cache, stack, labels, classes, pos)


@torch.no_grad()
def head_attribution(model: HookedViT | HookedText, cache: ActivationCache, classes: Classes) -> Attribution:
    """Return what every head adds to the logits of some classes; the last component is all the rest.

    Args:
        model, cache, classes: as in ``logit_attribution``.

    Raises:
        NotApplicable: as there, or a norm stands between the heads and the stream.
        UnknownName: the cache lacks activations; the message says which.
    """
    pos = _read_token(model)
    stack, labels = cache.stack_head_results(incl_remainder=True, pos_slice=pos, return_labels=True)
    return _attributed(cache, stack, labels, classes, pos)


@torch.no_grad()
def source_attribution(model: HookedViT | HookedText, cache: ActivationCache, classes: Classes) -> Tensor:
    """Return what every head adds to some logits, by the token it brings it from: ``[head source batch class]``.

    Patterns are frozen too: a head's sum over the tokens is its ``head_attribution``. Heads are counted through.

    Args:
        model, cache, classes: as in ``logit_attribution``; the cache holds ``attribution_names(model, sources=True)``.

    Raises:
        NotApplicable: as in ``head_attribution``.
        UnknownName: the cache lacks activations; the message says which.
    """
    pos, n = _read_token(model), len(cache.positions() or ())
    if not n:
        raise NotApplicable("The cache knows neither layout nor text: set cache.layout or cache.tokens.")
    directions = cache.directions(classes)
    stacks = (cache.stack_head_results(source=source, pos_slice=pos) for source in range(n))
    return torch.stack([_along(cache.project_stack(stack, pos_slice=pos), directions) for stack in stacks], 1)


@torch.no_grad()
def similarity_attribution(
    model: HookedDual,
    cache: ActivationCache,
    tower: Literal["vision", "text"] = "vision",
    by: Literal["layer", "head"] = "layer",
) -> Attribution:
    """Return what each component of one tower adds to the logit of each image and text.

    The other tower's vector is the direction; the length of this tower's own vector is frozen like the norms' scales.
    ``values`` are ``[component image text]``; with ``constant``, which counts ``logit_bias`` too, they sum to the
    logits.

    Args:
        model: the model that made the cache.
        cache: of images and texts, with its batch axis; holds ``attribution_names(model)``.
        tower: whose components.
        by: what a component is, as in ``logit_attribution`` or ``head_attribution``.

    Raises:
        NotApplicable: the tower's stream or its output is no sum; the message says why.
        UnknownName: the cache lacks activations; the message says which.

    Source: "Interpreting CLIP's Image Representation via Text-Based Decomposition" (Gandelsman et al. 2024), section 3.
    """
    own, part = (model.vision if tower == "vision" else model.text), cache.tower(tower)
    pos = _read_token(own)
    stacks = {"layer": part.decompose_resid, "head": part.stack_head_results}
    rest = {"incl_remainder": True} if by == "head" else {}
    stack, labels = stacks[by](pos_slice=pos, return_labels=True, **rest)
    directions = similarity_directions(model, cache, tower)
    values = torch.einsum("cbd,bod->cbo", part.project_stack(stack, pos_slice=pos), directions)
    constant = torch.einsum("bd,bod->bo", part.logit_constant(), directions)
    if tower == "text":
        values, constant = values.transpose(-2, -1), constant.T
    bias = model.logit_bias if model.spec.logit_bias else 0
    return Attribution(values, tuple(labels), constant + bias)


def similarity_directions(
    model: HookedDual, cache: ActivationCache, tower: Literal["vision", "text"] = "vision"
) -> Tensor:
    """Return the directions in a tower's output along which the logits lie: ``[image text d_embed]``, or text first.

    A component's output along them is what it adds to the logits: the other tower's unit vector, times
    ``exp(logit_scale)``, over the length of this tower's own.

    Args:
        model, cache, tower: as in ``similarity_attribution``.
    """
    other = cache["hook_text_embed" if tower == "vision" else "hook_image_embed"]
    length = cache[f"{tower}.hook_logits"].norm(dim=-1)
    return other * model.logit_scale.exp().to(other) / length[:, None, None]


def by_head(attribution: Attribution, n_layers: int) -> Tensor:
    """Return the heads of a ``head_attribution`` as ``[layer head batch class]``, without the remainder."""
    return attribution.values[:-1].unflatten(0, (n_layers, -1))


def _read_token(model: HookedViT | HookedText) -> int | None:
    """The one token the head reads, or None for all: spares the memory of the others."""
    spec: object = model.spec
    one = isinstance(spec, ModelSpec) and spec.pool.kind == "token" and spec.n_heads_out == 1
    return 0 if one else None  # the cache refuses other models


def _attributed(
    cache: ActivationCache, stack: Tensor, labels: Sequence[str], classes: Classes, pos: int | None
) -> Attribution:
    directions = cache.directions(classes)
    values = _along(cache.project_stack(stack, pos_slice=pos), directions)
    return Attribution(values, tuple(labels), _along(cache.logit_constant(), directions))


def _along(outputs: Tensor, directions: Tensor) -> Tensor:
    """Return outputs ``[... out]`` along directions ``[class out]``: ``[... class]``."""
    return outputs @ directions.to(outputs).T
