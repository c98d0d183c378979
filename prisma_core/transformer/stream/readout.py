"""From the normed stream to the vectors that a head reads, as a linear map: what pools is frozen as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from einops import einsum
from torch import Tensor, nn

from prisma_core.transformer.pool import PoolAttention


@dataclass(frozen=True)
class Readout:
    """The input of one head of a model.

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
            w_v, w_o, share = self.attn.W_V.to(x), self.attn.W_O.to(x), shares[0]
            if per_token:
                v = einsum(x, w_v, "... pos d, head d inner -> ... head pos inner") * share[..., None]
                return einsum(v, w_o, "... head pos inner, head inner out -> ... pos out")
            read = einsum(x, share, "... pos d, ... head pos -> ... head d")
            return einsum(read, w_v, w_o, "... head d, head d inner, head inner out -> ... out")
        if not shares:
            return x
        if per_token:
            return torch.cat([x * share[..., None] for share in shares], dim=-1)
        return torch.cat([einsum(x, share, "... pos d, ... pos -> ... d") for share in shares], dim=-1)

    def pooled_constant(self, x: Tensor) -> Tensor:
        """Return ``[... d_pool]`` of what all tokens share, ``[... d_model]``, with what pooling itself adds."""
        if self.attn is None:
            return torch.cat([x] * max(1, len(self.shares)), dim=-1)
        value = einsum(x, self.attn.W_V.to(x), "... d, head d inner -> ... head inner")
        b_v = cast(Tensor, self.attn.kv.bias.chunk(2)[1].unflatten(0, value.shape[-2:])).to(x)
        out = einsum(value + b_v, self.attn.W_O.to(x), "... head inner, head inner out -> ... out")
        out = out + self.attn.out.bias.to(x)
        return out if self.added is None else out + self.added.to(x)


def latent(x: Tensor, how: str) -> Tensor:
    """Return the first pooling query, or the mean of all, along the last axis but one."""
    return x.select(-2, 0) if how == "first" else x.mean(-2)
