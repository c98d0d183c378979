"""From the normed stream to the vectors that a head reads, as a linear map: what pools is frozen as it was."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from einops import einsum
from torch import Tensor, nn

from prisma_core.errors import NotApplicable, UnknownName, suggest

if TYPE_CHECKING:
    from prisma_core.transformer.norm import Norm
    from prisma_core.transformer.pool import PoolAttention
    from prisma_core.transformer.text import HookedText
    from prisma_core.transformer.vit import HookedViT


@dataclass(frozen=True)
class Readout:
    """What one head of a model reads.

    Attributes:
        head: None where the model gives out what is pooled.
        shares: of each token in what is pooled, ``[*batch pos]``, one for each of the vectors side by side; with
            attention ``[*batch head pos]``. None: every token is read by itself.
        attn: the attention that pools.
        added: what the pooling's MLP adds to that, ``[*batch d_pool]``.
    """

    head: nn.Linear | None
    shares: tuple[Tensor, ...]
    attn: PoolAttention | None = None
    added: Tensor | None = None

    def pooled(self, x: Tensor, shares: tuple[Tensor, ...], *, per_token: bool) -> Tensor:
        """Return ``[... d_pool]`` of components ``[... pos d_model]``, or what each token brings ``[... pos d_pool]``.

        Args:
            shares: those of the tokens of ``x``.
        """
        if self.attn is not None:
            return self._attended(x, shares[0], per_token=per_token)
        if not shares:
            return x
        if per_token:
            return torch.cat([x * share[..., None] for share in shares], dim=-1)
        return torch.cat([einsum(x, share, "... pos d, ... pos -> ... d") for share in shares], dim=-1)

    def _attended(self, x: Tensor, share: Tensor, *, per_token: bool) -> Tensor:
        assert self.attn is not None
        w_v, w_o = self.attn.W_V.to(x), self.attn.W_O.to(x)
        if per_token:
            v = einsum(x, w_v, "... pos d, head d inner -> ... head pos inner") * share[..., None]
            return einsum(v, w_o, "... head pos inner, head inner out -> ... pos out")
        read = einsum(x, share, "... pos d, ... head pos -> ... head d")
        return einsum(read, w_v, w_o, "... head d, head d inner, head inner out -> ... out")

    def pooled_constant(self, x: Tensor) -> Tensor:
        """Return ``[... d_pool]`` of what all tokens share, ``[... d_model]``, with what pooling itself adds."""
        if self.attn is None:
            return torch.cat([x] * max(1, len(self.shares)), dim=-1)
        value = einsum(x, self.attn.W_V.to(x), "... d, head d inner -> ... head inner")
        b_v = cast(Tensor, self.attn.kv.bias.chunk(2)[1].unflatten(0, value.shape[-2:])).to(x)
        out = einsum(value + b_v, self.attn.W_O.to(x), "... head inner, head inner out -> ... out")
        out = out + self.attn.out.bias.to(x)
        return out if self.added is None else out + self.added.to(x)


def image_readouts(vit: HookedViT, n_tokens: int, pattern: Tensor | None, added: Tensor | None) -> list[Readout]:
    """Return what each head of a vision transformer reads.

    Args:
        n_tokens: how many there are.
        pattern: of the attention that pools, ``[*batch head latent key]``, if one does.
        added: what its MLP adds, ``[*batch latent d_pool]``.
    """
    spec, like = vit.spec, next(vit.parameters())
    n_prefix, pool = spec.layout.n_prefix, spec.pool
    heads = [vit.head, *([vit.head_dist] if spec.n_heads_out == 2 else [])] if spec.n_classes is not None else [None]
    if pattern is not None:
        share = _latent(pattern, pool.latents)
        share = share if pool.with_prefix else nn.functional.pad(share, (n_prefix, 0))
        return [Readout(heads[0], (share,), vit.pool.attn, None if added is None else _latent(added, pool.latents))]
    if pool.kind in ("none", "patches"):
        return [Readout(heads[0], ())]
    first, second, mean = (like.new_zeros(n_tokens) for _ in range(3))
    first[0] = 1
    averaged = slice(0 if pool.with_prefix else n_prefix, None)
    mean[averaged] = 1 / len(range(n_tokens)[averaged])
    if spec.n_heads_out == 2:
        second[spec.layout.cls] = 1
        both = [*heads, *([None] if len(heads) == 1 else [])]
        return [Readout(both[0], (first,)), Readout(both[1], (second,))]
    shares = {"token": (first,), "avg": (mean,), "token_and_avg": (first, mean)}[pool.kind]
    return [Readout(heads[0], shares)]


def text_readouts(text: HookedText, tokens: Tensor | None) -> list[Readout]:
    """Return what the head of a text transformer reads.

    Raises:
        NotApplicable: its head is an MLP, or which token it reads is not known.
    """
    if text.spec.head is not None:
        raise NotApplicable(
            "This model's head is an MLP, so its output is no sum over components of the stream. decompose_resid, "
            "stack_head_results and accumulated_resid hold all the same."
        )
    head = text.head if text.spec.n_classes is not None else None
    if text.spec.pool.kind == "none":
        return [Readout(head, ())]
    if tokens is None:
        raise NotApplicable(
            "Which token the model reads depends on the text, which this cache does not know. Give it: "
            "cache.tokens = tokens."
        )
    return [Readout(head, (text.shares(tokens),))]


def linear(norm: Norm, x: Tensor, scale: Tensor) -> Tensor:
    """Return a norm of ``x`` with its scale given and its bias left out, which makes it linear."""
    if norm.spec.kind == "ln":
        x = x - x.mean(-1, keepdim=True)
    return x / scale * norm.weight.to(x)


def class_index(model: HookedViT | HookedText, given: int | str) -> int:
    """Return which class an index or a label means.

    Raises:
        NotApplicable: there are no classes.
        UnknownName: no such class.
    """
    labels, n = model.labels or (), model.spec.n_classes
    if n is None:
        raise NotApplicable(
            "This model has no head, so there are no logits to count. Give a direction in its output instead, as "
            "floating point numbers."
        )
    if isinstance(given, str):
        if given in labels:
            return labels.index(given)
        alike = [index for index, label in enumerate(labels) if _words(label) == _words(given)]
        if len(alike) != 1:
            raise UnknownName(f"No class {given!r} among the model's {len(labels)} labels.{suggest(given, labels)}")
        return alike[0]
    if not 0 <= given < n:
        raise UnknownName(f"No class {given}: they run from 0 to {n - 1}.")
    return given


def _words(label: str) -> list[str]:
    """Return the words of a label: an emoji before them, capitals and punctuation do not count."""
    return re.findall(r"\w+", label.casefold())


def _latent(x: Tensor, how: str) -> Tensor:
    """Return what is read of the queries that pool, on the last axis but one."""
    return x.select(-2, 0) if how == "first" else x.mean(-2)
