"""Softmax attention, fused unless its insides are wanted."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from prisma_core.errors import InputError
from prisma_core.hooks.point import HookPoint
from prisma_core.spec import AttentionSpec, RopeSpec
from prisma_core.toolbox.derivatives import fused_attention
from prisma_core.toolbox.precision import HALF, show, softmax, unrounded, widened
from prisma_core.toolbox.query_rows import Rows
from prisma_core.transformer.norm import Norm
from prisma_core.transformer.recipes import computed
from prisma_core.transformer.rope import Layout, rotate
from prisma_core.transformer.weights import WeightViews, check_linear, held


class HeadInputs(NamedTuple):
    """Inputs of single heads ``[batch pos head d_model]``; None where all heads read the same."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None

    def after(self, norm: nn.Module, x: Tensor, normed: Tensor) -> HeadInputs:
        """Return the inputs after what stands before the attention, a norm or an identity, past its hook points.

        What hooks there change in the norm of the stream is added, so that they reach every head: ``x`` is the stream,
        ``normed`` what they made of its norm.
        """
        if isinstance(norm, nn.Identity) or all(each is None for each in self):
            return self
        apply = norm.fused if isinstance(norm, Norm) else norm  # what stands in its place has no hook points
        change = (normed - apply(x)).unsqueeze(2)
        return HeadInputs(*(None if each is None else apply(each) + change for each in self))


NO_INPUTS = HeadInputs()


class Rope(NamedTuple):
    """One layer's tables ``[pos 1|head d_head]``."""

    cos: Tensor
    sin: Tensor


def attend(
    q: Float[Tensor, "batch query_pos head d_head"],
    k: Float[Tensor, "batch key_pos kv_head d_head"],
    v: Float[Tensor, "batch key_pos kv_head d_head"],
    scale: float,
    bias: Float[Tensor, "#batch #head query_pos key_pos"] | None,
    scores: HookPoint,
    pattern: HookPoint,
) -> Float[Tensor, "batch query_pos head d_head"]:
    """Return ``softmax(q . k * scale + bias) v``, by the fused kernel unless whole scores or patterns are asked for.

    Where scopes only keep some queries' rows of them, these rows are computed beside the kernel. Half dtypes are
    computed in float32 where the kernel is not used. Each key and value head serves as many query heads, side by side.
    """
    dtype, groups = q.dtype, q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if scores.wanted or pattern.wanted:
        rows = Rows.asked(scores, pattern)
        with unrounded(q):
            x = (widened(q if rows is None else rows.of(q)) * scale) @ widened(k).transpose(-2, -1)
        if bias is not None:
            x = x + (bias if rows is None else rows.of(bias.expand(-1, -1, q.shape[2], -1)))
        if rows is None:
            x = show(scores, x, dtype)
            whole = x.dtype == dtype and dtype not in HALF
            soft = softmax if bias is not None or scores.edited else _softmax
            x = computed(pattern, soft, x) if whole else show(pattern, soft(x), dtype)
            with unrounded(x):
                return (x @ widened(v)).to(dtype).transpose(1, 2)
        rows.store(scores, x.to(dtype))
        rows.store(pattern, softmax(x).to(dtype))
    return fused_attention(q, k, v, bias, scale).transpose(1, 2)


def _softmax(x: Tensor) -> Tensor:
    """Return the softmax where every query may read a key: without the two passes that look for others."""
    return x.softmax(-1)


class Attention(WeightViews):
    """Multi-head softmax attention.

    Queries, keys and values come from one fused projection. The fused kernel runs unless scores or patterns are asked
    for. ``W_Q``, ``W_K``, ``W_V``, ``W_O`` and the biases are views: writing to them edits the model.
    """

    def __init__(self, spec: AttentionSpec, d_model: int, n_tokens: int, rope: RopeSpec | None = None):
        super().__init__()
        self.spec = spec
        self.rope_layout: Layout | None = rope.layout if rope else None
        self.rope_in_float32 = rope is not None and rope.in_float32
        heads, kv_heads, width = spec.n_heads, spec.n_kv_heads, spec.d_head
        self.sizes = [heads * width, kv_heads * width, kv_heads * width]
        self.qkv = nn.Linear(d_model, sum(self.sizes))
        if spec.bias:
            self.attn_bias = nn.Parameter(torch.zeros(heads, n_tokens, n_tokens))
        normed = ", normed" if spec.qk_norm else ""
        kv_axis = "head" if kv_heads == heads else "kv_head"
        self.q_norm = _qk_norm(spec, heads, "head")
        self.k_norm = _qk_norm(spec, kv_heads, kv_axis)
        self.hook_q = HookPoint("batch pos head d_head", f"x W_Q + b_Q{normed}")
        self.hook_k = HookPoint(f"batch pos {kv_axis} d_head", f"x W_K + b_K{normed}")
        self.hook_v = HookPoint(f"batch pos {kv_axis} d_head", "x W_V + b_V")
        if rope:
            self.hook_rot_q = HookPoint("batch pos head d_head", "q turned by its position")
            self.hook_rot_k = HookPoint(f"batch pos {kv_axis} d_head", "k turned by its position")
        q, k = ("rot_q", "rot_k") if rope else ("q", "k")
        self.hook_attn_scores = HookPoint(
            "batch head query_pos key_pos", f"{q} . {k} * scale" + (" + attn_bias" if spec.bias else "")
        )
        self.hook_pattern = HookPoint("batch head query_pos key_pos", "softmax(attn_scores)")
        self.hook_z = HookPoint("batch pos head d_head", "pattern v")
        self.ln = nn.Identity() if spec.inner_norm is None else Norm(spec.inner_norm, heads * width, "batch pos d_attn")
        self.out = nn.Linear(heads * width, d_model)
        source = "ln(z)" if spec.inner_norm else "z"
        self.hook_result = HookPoint("batch pos head d_model", f"{source} W_O, of each head", derived=True)

    # ---------------------------------------------------------------- weights

    def _part(self, index: int, tensor: Tensor) -> Tensor:
        part = torch.split(tensor, self.sizes)[index]
        return rearrange(part, "(head d_head) ... -> head ... d_head", d_head=self.spec.d_head)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights, a view: ``[head d_model d_head]``."""
        return self._part(0, held(self.qkv, "weight"))

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Key weights, a view: ``[kv_head d_model d_head]``."""
        return self._part(1, held(self.qkv, "weight"))

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Value weights, a view: ``[kv_head d_model d_head]``."""
        return self._part(2, held(self.qkv, "weight"))

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights, a view: ``[head d_head d_model]``."""
        return rearrange(
            held(self.out, "weight"), "d_model (head d_head) -> head d_head d_model", head=self.spec.n_heads
        )

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query bias, a view: ``[head d_head]``."""
        return self._part(0, held(self.qkv, "bias"))

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """Key bias, a view: ``[kv_head d_head]``."""
        return self._part(1, held(self.qkv, "bias"))

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """Value bias, a view: ``[kv_head d_head]``."""
        return self._part(2, held(self.qkv, "bias"))

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias: ``[d_model]``."""
        return held(self.out, "bias")

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        rope: Rope | None = None,
        inputs: HeadInputs = NO_INPUTS,
        mask: Bool[Tensor, "#batch 1 query_pos key_pos"] | None = None,
        leading: int | None = None,
    ) -> Float[Tensor, "batch query_pos d_model"]:
        """Return the output of all heads, added up: ``[batch pos d_model]``.

        Args:
            x: the normed stream.
            rope: tables by which queries and keys are turned.
            inputs: of single heads, in the place of ``x``.
            mask: which keys each query may read; None for all. Scores of others are minus infinity.
            leading: how many tokens, from the first, ask: queries and what follows are of these alone; None for all.

        Fewer tokens than ``attn_bias`` has, as in a shorter text, take its rows and columns from the first on.
        """
        q, k, v = self._project(x, inputs, leading)
        over = self.spec.qk_norm_over
        q, k = _normed(self.q_norm, q, over), _normed(self.k_norm, k, over)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        if rope is not None and self.rope_layout is not None:
            if self.rope_in_float32:
                rope = Rope(rope.cos.float(), rope.sin.float())  # once for both, as gradients are summed
            cos, sin = rope.cos[:leading], rope.sin[:leading]
            q = self.hook_rot_q(rotate(q, cos, sin, self.rope_layout, self.rope_in_float32))
            k = self.hook_rot_k(rotate(k, rope.cos, rope.sin, self.rope_layout, self.rope_in_float32))
        bias = self._bias(mask, k)
        bias = bias if bias is None or leading is None else bias[..., :leading, :]
        z = self.hook_z(attend(q, k, v, self.spec.scale, bias, self.hook_attn_scores, self.hook_pattern))
        flat = self.ln(z.flatten(2))
        if not self.hook_result.wanted:
            return self.out(flat)
        check_linear(self.out, "out", "hook_result")
        heads, w_o = widened(flat.view(z.shape)), widened(self.W_O.type_as(flat))
        with unrounded(flat):
            result = einsum(heads, w_o, "batch pos head d_head, head d_head d_model -> batch pos head d_model")
        return (show(self.hook_result, result, flat.dtype).sum(2) + self.b_O).type_as(flat)

    def _project(self, x: Tensor, inputs: HeadInputs, leading: int | None) -> list[Tensor]:
        heads = [size // self.spec.d_head for size in self.sizes]
        if leading is None or not _is_plain(self.qkv):
            parts = self._by_head(self.qkv(x), heads)
            if leading is not None:
                parts[0] = parts[0][:, :leading]
        else:
            n, weight, bias = self.sizes[0], self.qkv.weight, self.qkv.bias
            queries: Tensor = F.linear(x[:, :leading], weight[:n], bias[:n])
            others: Tensor = F.linear(x, weight[n:], bias[n:])
            parts = [*self._by_head(queries, heads[:1]), *self._by_head(others, heads[1:])]
        for index, x_head in enumerate(inputs):
            if x_head is not None:
                check_linear(self.qkv, "qkv", "inputs of single heads")
                x_head = x_head[:, :leading] if index == 0 else x_head
                weight, bias = self._part(index, self.qkv.weight), self._part(index, self.qkv.bias)
                projected: Tensor = einsum(
                    x_head, weight, "batch pos head d_model, head d_model d_head -> batch pos head d_head"
                )
                parts[index] = projected + bias
        return parts

    def _by_head(self, x: Tensor, heads: list[int]) -> list[Tensor]:
        """Return the parts of a projection, with as many heads each: ``[batch pos head d_head]``."""
        split = x.reshape(x.shape[0], x.shape[1], sum(heads), self.spec.d_head)
        return list(split.split_with_sizes(heads, 2))

    def _bias(self, mask: Tensor | None, k: Tensor) -> Tensor | None:
        bias, dtype, n = None, k.dtype, k.shape[1]
        if self.spec.bias:
            if n > self.attn_bias.shape[-1]:
                raise InputError(f"Expected at most {self.attn_bias.shape[-1]} tokens, as attn_bias has, got {n}.")
            # Kernels look at the flag even where no gradient is taken, and choose a slower one.
            bias = (self.attn_bias if torch.is_grad_enabled() else self.attn_bias.detach())[None, :, :n, :n]
        if mask is None:
            return bias
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
        return hidden if bias is None else bias + hidden


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is its weight and bias alone: no adapter, no hook of torch's, no forward of its own."""
    fields = vars(layer)
    changed = [name for name in ("_forward_hooks", "_forward_pre_hooks", "forward") if fields.get(name)]
    return type(layer) is nn.Linear and not changed


def _qk_norm(spec: AttentionSpec, heads: int, head_axis: str) -> Norm | nn.Identity:
    if spec.qk_norm is None:
        return nn.Identity()
    if spec.qk_norm_over == "all_heads":
        return Norm(spec.qk_norm, heads * spec.d_head, "batch pos d_attn")
    return Norm(spec.qk_norm, spec.d_head, f"batch pos {head_axis} d_head")


def _normed(norm: nn.Module, x: Tensor, over: str) -> Tensor:
    if over == "all_heads":
        return norm(x.flatten(2)).view(x.shape)
    return norm(x)
