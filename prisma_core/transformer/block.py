"""Transformer blocks: attention and MLP, and how their outputs join the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from operator import add
from typing import Any, Generic, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.errors import InputError, NotApplicable
from prisma_core.errors.arguments import expect, number
from prisma_core.hooks.point import OPEN_SCOPES, HookPoint
from prisma_core.spec import BlockSpec, RopeSpec
from prisma_core.transformer.attention import NO_INPUTS, Attention, HeadInputs, Rope
from prisma_core.transformer.mlp import MLP
from prisma_core.transformer.norm import Scale, norm_or_identity
from prisma_core.transformer.recipes import computed

STREAM = "batch pos d_model"


class Block(nn.Module):
    """One block that adds attention, then MLP, to the residual stream.

    ``hook_attn_out`` and ``hook_mlp_out`` are always what is added to the stream, after any norm and layer scale. A
    ``post`` block norms the stream itself: the MLP reads ``ln1(resid_mid)``, and the next block ``ln2(resid_post)``.
    With ``leading`` all tokens are read, and only as many, from the first, are computed and returned.
    """

    def __init__(self, spec: BlockSpec, d_model: int, n_tokens: int, rope: RopeSpec | None):
        super().__init__()
        self.spec = spec
        self.hook_resid_pre = HookPoint(STREAM, "the stream before the block")
        self.hook_q_input, self.hook_k_input, self.hook_v_input = head_input_points(spec)
        after = spec.kind == "res_post"  # parts are made in the order in which their hook points fire
        if spec.kind in ("pre", "parallel"):
            self.ln1 = norm_or_identity(spec.ln1, d_model)
        self.attn = Attention(spec.attn, d_model, n_tokens, rope)
        if after:
            self.ln1 = norm_or_identity(spec.ln1, d_model)
        self.ls1 = Scale(d_model) if spec.attn_scale else nn.Identity()
        self.hook_attn_out = HookPoint(STREAM, "what attention adds to the stream")
        if spec.mlp is not None:
            if spec.kind != "parallel":
                self.hook_resid_mid = HookPoint(STREAM, "resid_pre + attn_out")
            if spec.kind == "pre":
                self.ln2 = norm_or_identity(spec.ln2, d_model)
            if spec.kind == "post":
                self.ln1 = norm_or_identity(spec.ln1, d_model)
            self.mlp = MLP(spec.mlp, d_model, d_model)
            if after:
                self.ln2 = norm_or_identity(spec.ln2, d_model)
            self.ls2 = Scale(d_model) if spec.mlp_scale else nn.Identity()
            self.hook_mlp_out = HookPoint(STREAM, "what the MLP adds to the stream")
        before = {"parallel": "resid_pre + attn_out", "post": "ln1(resid_mid)"}.get(spec.kind, "resid_mid")
        self.hook_resid_post = HookPoint(STREAM, f"{before} + mlp_out" if spec.mlp else "resid_pre + attn_out")
        if spec.kind == "post":
            self.ln2 = norm_or_identity(spec.ln2, d_model)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        rope: Rope | None = None,
        mask: Tensor | None = None,
        leading: int | None = None,
    ) -> Float[Tensor, "batch query_pos d_model"]:
        x, kind = self.hook_resid_pre(x), self.spec.kind
        (inputs,) = head_inputs(x, self.spec, self.hook_q_input, self.hook_k_input, self.hook_v_input)
        normed = x
        if kind in ("pre", "parallel"):
            normed = self.ln1(x)
            inputs = inputs.after(self.ln1, x, normed)
        attn_out = self.attn(normed, rope, inputs, mask, leading)
        if leading is not None:
            x, normed = x[:, :leading], normed[:, :leading]
        attn_out = self.hook_attn_out(self.ls1(self.ln1(attn_out) if kind == "res_post" else attn_out))
        if kind == "parallel" and self.spec.mlp is not None:
            mlp_out = self.hook_mlp_out(self.ls2(self.mlp(normed)))
            return computed(self.hook_resid_post, _sum, x, attn_out, mlp_out)
        if self.spec.mlp is None:
            return computed(self.hook_resid_post, add, x, attn_out)
        x = computed(self.hook_resid_mid, add, x, attn_out)
        if kind == "post":
            x = self.ln1(x)
        mlp_out = self.mlp(self.ln2(x) if kind == "pre" else x)
        mlp_out = self.hook_mlp_out(self.ls2(self.ln2(mlp_out) if kind == "res_post" else mlp_out))
        x = computed(self.hook_resid_post, add, x, mlp_out)
        return self.ln2(x) if kind == "post" else x


class SideBySide(nn.Module):
    """One block that adds several attentions to the residual stream at once, then several MLPs.

    Each has a norm and a scale of its own, found by its number: ``blocks.{l}.attn.{i}``, ``blocks.{l}.ln1.{i}``.
    ``hook_q_input`` and its like hold the heads of all attentions, one attention after the other.

    Source: "Three things everyone should know about vision transformers" (Touvron et al. 2022), section 3.
    """

    def __init__(self, spec: BlockSpec, d_model: int, n_tokens: int, rope: RopeSpec | None):
        super().__init__()
        self.spec = spec
        self.hook_resid_pre = HookPoint(STREAM, "the stream before the block")
        self.hook_q_input, self.hook_k_input, self.hook_v_input = head_input_points(spec)
        self.ln1, self.attn, self.ls1 = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(spec.n_parallel):
            self.ln1.append(norm_or_identity(spec.ln1, d_model))
            self.attn.append(Attention(spec.attn, d_model, n_tokens, rope))
            self.ls1.append(Scale(d_model) if spec.attn_scale else nn.Identity())
        self.hook_attn_out = HookPoint(STREAM, "what all attentions add to the stream")
        if spec.mlp is not None:
            self.hook_resid_mid = HookPoint(STREAM, "resid_pre + attn_out")
            self.ln2, self.mlp, self.ls2 = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
            for _ in range(spec.n_parallel):
                self.ln2.append(norm_or_identity(spec.ln2, d_model))
                self.mlp.append(MLP(spec.mlp, d_model, d_model))
                self.ls2.append(Scale(d_model) if spec.mlp_scale else nn.Identity())
            self.hook_mlp_out = HookPoint(STREAM, "what all MLPs add to the stream")
        self.hook_resid_post = HookPoint(STREAM, "resid_mid + mlp_out" if spec.mlp else "resid_pre + attn_out")

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        rope: Rope | None = None,
        mask: Tensor | None = None,
        leading: int | None = None,
    ) -> Float[Tensor, "batch query_pos d_model"]:
        x = self.hook_resid_pre(x)
        inputs = head_inputs(x, self.spec, self.hook_q_input, self.hook_k_input, self.hook_v_input)
        outs: list[Tensor] = []
        for norm, attn, scale, heads in zip(self.ln1, self.attn, self.ls1, inputs, strict=True):
            normed = norm(x)
            outs.append(scale(attn(normed, rope, heads.after(norm, x, normed), mask, leading)))
        x, attn_out = x if leading is None else x[:, :leading], self.hook_attn_out(torch.stack(outs).sum(0))
        if self.spec.mlp is None:
            return computed(self.hook_resid_post, add, x, attn_out)
        x = computed(self.hook_resid_mid, add, x, attn_out)
        outs = [scale(mlp(norm(x))) for norm, mlp, scale in zip(self.ln2, self.mlp, self.ls2, strict=True)]
        return computed(self.hook_resid_post, add, x, self.hook_mlp_out(torch.stack(outs).sum(0)))


def _sum(x: Tensor, attn_out: Tensor, mlp_out: Tensor) -> Tensor:
    return x + attn_out + mlp_out


def make_block(spec: BlockSpec, d_model: int, n_tokens: int, rope: RopeSpec | None) -> Block | SideBySide:
    """Return the block of a spec."""
    kind = Block if spec.n_parallel == 1 else SideBySide
    return kind(spec, d_model, n_tokens, rope)


# -------------------------------------------------------------------- inputs of single heads


def head_input_points(spec: BlockSpec) -> tuple[HookPoint, HookPoint, HookPoint]:
    """Return the hook points of what each head reads for its queries, keys and values."""
    grouped = "kv_head" if spec.attn.n_heads != spec.attn.n_kv_heads else "head"
    of_each = " of each attention" if spec.n_parallel > 1 else ""
    query, key, value = (
        HookPoint(f"batch pos {axis} d_model", f"resid_pre, once for each {kind} head{of_each}", derived=True)
        for kind, axis in (("query", "head"), ("key", grouped), ("value", grouped))
    )
    return query, key, value


def head_inputs(x: Tensor, spec: BlockSpec, *points: HookPoint) -> list[HeadInputs]:
    """Return what each head of each attention reads of the stream, where a scope asks for inputs of single heads.

    ``points`` are of the inputs of queries, keys and values, each with the heads of all attentions.
    """
    if not OPEN_SCOPES.get() or not any(point.wanted for point in points):
        return [NO_INPUTS] * spec.n_parallel
    columns: list[list[Tensor | None]] = []
    for point, n in zip(points, (spec.attn.n_heads, spec.attn.n_kv_heads, spec.attn.n_kv_heads), strict=True):
        if not point.wanted:
            columns.append([None] * spec.n_parallel)
            continue
        copies = point(x.unsqueeze(2).expand(-1, -1, n * spec.n_parallel, -1).contiguous())
        columns.append(list(copies.chunk(spec.n_parallel, dim=2)))
    return [HeadInputs(*row) for row in zip(*columns, strict=True)]


# -------------------------------------------------------------------- parts of a block, by their kind

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Branch(Generic[M]):
    """One attention or MLP of a block, with the layer scale that belongs to it.

    Attributes:
        name: its path in the block: ``attn``, or ``attn.1`` of several side by side.
        side: its number among those side by side.
    """

    name: str
    side: int
    module: M
    scale: nn.Module

    def scaled(self, x: Float[Tensor, "*outer d_model"]) -> Float[Tensor, "*outer d_model"]:
        """Return ``x`` after layer scale."""
        return x * self.scale.gamma.to(x) if isinstance(self.scale, Scale) else x


_BLOCK = "a block of a canonical transformer, such as model.blocks[0]"


def attentions(block: Block | SideBySide) -> list[Branch[Attention]]:
    """Return the attentions of a block: one, or several side by side."""
    expect(block, (Block, SideBySide), _BLOCK)
    return _branches(block, "attn", "ls1")


def mlps(block: Block | SideBySide) -> list[Branch[MLP]]:
    """Return the MLPs of a block: one, several side by side, or none."""
    expect(block, (Block, SideBySide), _BLOCK)
    return _branches(block, "mlp", "ls2") if hasattr(block, "mlp") else []


def _branches(block: nn.Module, kind: str, scale: str) -> list[Branch[Any]]:
    module, scales = cast(nn.Module, getattr(block, kind)), cast(nn.Module, getattr(block, scale))
    if not isinstance(module, nn.ModuleList):
        alone: Branch[Any] = Branch(kind, 0, module, scales)
        return [alone]
    sides = enumerate(zip(module, cast(nn.ModuleList, scales), strict=True))
    return [Branch(f"{kind}.{side}", side, one, its_scale) for side, (one, its_scale) in sides]


# -------------------------------------------------------------------- the stream between blocks


def end_of(blocks: list[Block | SideBySide], layer: int | None, mlp_input: bool = False) -> int:
    """Return how many whole blocks stand before a place in the stream; all of them for None and -1.

    Args:
        layer: the block whose input the place is.
        mlp_input: the place is the input of that block's MLP.

    Raises:
        InputError: there is no such layer.
        NotApplicable: the layer has no MLP that reads the stream after its attention.
    """
    n = len(blocks)
    end = -1 if layer is None else number(layer, "a layer")
    if not -1 <= end <= n:
        raise InputError(f"No layer {layer}: expected 0 to {n}, where {n}, -1 and None are the end of the stream.")
    end = n if end == -1 else end
    if mlp_input and end == n:
        raise InputError("mlp_input speaks of a layer's MLP: give the layer.")
    if mlp_input and (blocks[end].spec.mlp is None or blocks[end].spec.kind == "parallel"):
        raise NotApplicable(f"Layer {end} has no MLP that reads the stream after its attention.")
    return end


def check_sum(blocks: list[Block | SideBySide]) -> None:
    """Refuse blocks that norm the stream itself (``NotApplicable``): it is more than the sum of what they add to it."""
    for index, block in enumerate(blocks):
        if block.spec.kind == "post":
            raise NotApplicable(
                f"Layer {index} norms the stream itself after each addition (post-norm, as BERT does), so the "
                "stream is no sum of what was added to it. accumulated_resid, patterns and patches hold all the "
                "same."
            )
