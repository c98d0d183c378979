"""The logit lens: what the head would say of every token, after every layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prisma_core import ActivationCache, HookedText, HookedViT, NotApplicable

LENS_NAMES = ("*.hook_resid_pre", "*.hook_resid_post")
"""Activations that ``logit_lens`` reads from a cache."""


class Lens(NamedTuple):
    """Logits of every token after every layer.

    Attributes:
        logits: ``[stage batch pos class]``; stage 0 is the stream before block 0, the last stage the one after the
            last block.
        stages: the stages' names: ``0_pre``, ``1_pre``, ..., ``final_post``.
    """

    logits: Tensor
    stages: tuple[str, ...]


@torch.no_grad()
def logit_lens(model: HookedViT | HookedText, cache: ActivationCache) -> Lens:
    """Return the logits of every token, of a picture or of a text, taken alone, as if it were the one the head reads.

    Each token of the residual stream goes through the final norm, the pooling of a picture that is this one token, the
    norm after it and the head. For a model that reads its class token, the class token's lens after the last block is
    the model's own output; for one that pools by the mean, the mean is of one token; for attention pooling, all
    attention goes to it.

    Of a tower of a dual encoder, ``logit_lens(model.text, cache.tower("text"))``: its logits are the vector it
    compares.

    Args:
        model: the model that made the cache; it needs a head.
        cache: holds ``resid_pre`` of every block and ``resid_post`` of the last one, for the tokens wanted.

    Raises:
        NotApplicable: the model has no head, one head for each of several tokens, or blocks that norm the stream.
        UnknownName: the cache lacks a stream.
    """
    streams, stages = cache.accumulated_resid(return_labels=True)
    return Lens(torch.stack([token_logits(model, stream) for stream in streams]), tuple(stages))


def token_logits(model: HookedViT | HookedText, stream: Tensor) -> Tensor:
    """Return the logits ``[... class]`` of every token of a residual stream ``[... d_model]``, each taken alone.

    Raises:
        NotApplicable: the model has no head, or one head for each of several tokens.
    """
    if model.spec.n_classes is None:
        raise NotApplicable("This model has no classification head, so there are no logits to look through.")
    if isinstance(model, HookedViT) and model.spec.n_heads_out > 1:
        raise NotApplicable(
            f"This model reads {model.spec.n_heads_out} tokens with a head each and averages their logits; a lens "
            "needs one head. Its streams are in the cache all the same."
        )
    if any(block.kind == "post" for block in model.spec.blocks):
        raise NotApplicable(
            "This model's blocks norm the stream itself (post-norm, as BERT does), so a stream inside is not what its "
            "head could read. Its streams are in the cache all the same."
        )
    tokens = stream.reshape(-1, 1, stream.shape[-1])
    if model.spec.ln_final is not None:
        tokens = model.ln_final(tokens)
    pooled = model.ln_pool(tokens[:, 0] if isinstance(model, HookedText) else model.pool(tokens, 0))
    logits = model.head_mlp(pooled) if isinstance(model, HookedText) and model.spec.head else model.head(pooled)
    return logits.reshape(*stream.shape[:-1], logits.shape[-1])
