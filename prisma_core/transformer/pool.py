"""From tokens to the vector the head reads."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.hooks.point import HookPoint
from prisma_core.spec import AttentionSpec, PoolSpec
from prisma_core.transformer.attention import attend
from prisma_core.transformer.mlp import MLP
from prisma_core.transformer.norm import norm_or_identity
from prisma_core.transformer.weights import WeightViews, held


class Pool(nn.Module):
    """Class token, mean, both, attention from learned queries, the patches, or all tokens.

    Source of attention pooling: "Set Transformer" (Lee et al. 2019), section 3.2.
    """

    def __init__(self, spec: PoolSpec, d_model: int, d_pool: int):
        super().__init__()
        self.spec = spec
        if spec.attn is not None:
            latents = "batch latent d_model"
            tokens = "pos" if spec.with_prefix else "patch"
            self.attn = PoolAttention(spec.attn, spec, d_model, d_pool, tokens)
            self.hook_attn_out = HookPoint(latents, "what attention returns for each latent")
            if spec.mlp is not None:
                self.ln = norm_or_identity(spec.norm, d_pool, latents)
                self.mlp = MLP(spec.mlp, d_pool, d_pool, "batch latent")
                self.hook_mlp_out = HookPoint(latents, "what the MLP adds to attn_out")

    def forward(self, x: Float[Tensor, "batch pos d_model"], n_prefix: int) -> Float[Tensor, "batch *pos d_pool"]:
        if self.spec.kind == "none":
            return x
        first = x[:, 0]
        if self.spec.kind == "token":
            return first
        if not self.spec.with_prefix:
            x = x[:, n_prefix:]
        if self.spec.kind == "patches":
            return x.contiguous()  # as a hook's copy of it is, for the head's kernel looks at that
        if self.spec.kind in ("avg", "token_and_avg"):
            mean = x.mean(dim=1)
            return mean if self.spec.kind == "avg" else torch.cat([first, mean], dim=1)
        x = self.hook_attn_out(self.attn(x))
        if self.spec.mlp is not None:
            x = x + self.hook_mlp_out(self.mlp(self.ln(x)))
        return x[:, 0] if self.spec.latents == "first" else x.mean(dim=1)


class PoolAttention(WeightViews):
    """Softmax attention from learned queries to tokens.

    Attributes:
        latent: what the queries are made of: ``[latent d_model]``.
    """

    def __init__(self, spec: AttentionSpec, pool: PoolSpec, d_model: int, d_out: int, tokens: str):
        super().__init__()
        self.spec = spec
        width = spec.n_heads * spec.d_head
        normed = ", normed" if spec.qk_norm else ""
        d_latent = pool.d_latent or d_model
        self.latent = nn.Parameter(torch.zeros(pool.n_latents, d_latent))
        self.ln_latent = norm_or_identity(pool.latent_norm, d_latent, "batch latent d_model")
        self.q = nn.Linear(d_latent, width)
        self.kv = nn.Linear(d_model, 2 * width)
        self.q_norm = norm_or_identity(spec.qk_norm, spec.d_head, "batch latent head d_head")
        self.k_norm = norm_or_identity(spec.qk_norm, spec.d_head, f"batch {tokens} head d_head")
        read = "ln_latent(latent)" if pool.latent_norm else "latent"
        self.hook_q = HookPoint("batch latent head d_head", f"{read} W_Q + b_Q{normed}")
        self.hook_k = HookPoint(f"batch {tokens} head d_head", f"x W_K + b_K{normed}")
        self.hook_v = HookPoint(f"batch {tokens} head d_head", "x W_V + b_V")
        self.hook_attn_scores = HookPoint(f"batch head latent key_{tokens}", "q . k * scale")
        self.hook_pattern = HookPoint(f"batch head latent key_{tokens}", "softmax(attn_scores)")
        self.hook_z = HookPoint("batch latent head d_head", "pattern v")
        self.out = nn.Linear(width, d_out)

    @property
    def W_Q(self) -> Float[Tensor, "head d_in d_head"]:
        """Query weights, a view: ``[head d_model d_head]``."""
        return self._by_head(held(self.q, "weight"))

    @property
    def W_K(self) -> Float[Tensor, "head d_in d_head"]:
        """Key weights, a view: ``[head d_model d_head]``."""
        return self._by_head(held(self.kv, "weight").chunk(2)[0])

    @property
    def W_V(self) -> Float[Tensor, "head d_in d_head"]:
        """Value weights, a view: ``[head d_model d_head]``."""
        return self._by_head(held(self.kv, "weight").chunk(2)[1])

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_out"]:
        """Output weights, a view: ``[head d_head d_model]``."""
        return rearrange(
            held(self.out, "weight"), "d_model (head d_head) -> head d_head d_model", head=self.spec.n_heads
        )

    def _by_head(self, weight: Tensor) -> Tensor:
        return rearrange(weight, "(head d_head) d_model -> head d_model d_head", head=self.spec.n_heads)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch latent d_out"]:
        split = (self.spec.n_heads, self.spec.d_head)
        q = self.q(self.ln_latent(self.latent.expand(x.shape[0], -1, -1))).unflatten(-1, split)
        k, v = (part.unflatten(-1, split) for part in self.kv(x).chunk(2, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        z = self.hook_z(attend(q, k, v, self.spec.scale, None, self.hook_attn_scores, self.hook_pattern))
        return self.out(z.flatten(2))
