"""Transformer blocks: attention and MLP, and how their outputs join the residual stream."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.hooks.point import HookPoint
from prisma_core.spec import BlockSpec, RopeSpec
from prisma_core.transformer.attention import Attention, HeadInputs, Rope
from prisma_core.transformer.mlp import MLP
from prisma_core.transformer.norm import Norm, Scale, norm_or_identity

STREAM = "batch pos d_model"


class Block(nn.Module):
    """One block that adds attention, then MLP, to the residual stream.

    ``hook_attn_out`` and ``hook_mlp_out`` are always what is added to the stream, after any norm and layer scale. A
    ``post`` block norms the stream itself: the MLP reads ``ln1(resid_mid)``, and the next block ``ln2(resid_post)``.
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
        self, x: Float[Tensor, "batch pos d_model"], rope: Rope | None = None, mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        x = self.hook_resid_pre(x)
        if self.spec.kind == "parallel":
            normed = self.ln1(x)
            attn_out = self.hook_attn_out(self.ls1(self.attn(normed, rope, self._inputs(x), mask)))
            mlp_out = self.hook_mlp_out(self.ls2(self.mlp(normed)))
            return self.hook_resid_post(x + attn_out + mlp_out)
        if self.spec.kind == "post":
            attn_out = self.hook_attn_out(self.ls1(self.attn(x, rope, self._inputs(x), mask)))
            x = self.ln1(self.hook_resid_mid(x + attn_out))
            return self.ln2(self.hook_resid_post(x + self.hook_mlp_out(self.ls2(self.mlp(x)))))
        if self.spec.kind == "res_post":
            attn_out = self.hook_attn_out(self.ls1(self.ln1(self.attn(x, rope, self._inputs(x), mask))))
        else:
            attn_out = self.hook_attn_out(self.ls1(self.attn(self.ln1(x), rope, self._inputs(x), mask)))
        x = x + attn_out
        if self.spec.mlp is None:
            return self.hook_resid_post(x)
        x = self.hook_resid_mid(x)
        if self.spec.kind == "res_post":
            return self.hook_resid_post(x + self.hook_mlp_out(self.ls2(self.ln2(self.mlp(x)))))
        return self.hook_resid_post(x + self.hook_mlp_out(self.ls2(self.mlp(self.ln2(x)))))

    def _inputs(self, x: Tensor) -> HeadInputs:
        reads_as_is = self.spec.kind in ("res_post", "post") or self.spec.ln1 is None
        ln1 = None if reads_as_is else cast(Norm, self.ln1)
        return head_inputs(x, (self.hook_q_input, self.hook_k_input, self.hook_v_input), self.spec, (ln1,))[0]


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
        self, x: Float[Tensor, "batch pos d_model"], rope: Rope | None = None, mask: Tensor | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        x = self.hook_resid_pre(x)
        points = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        norms = tuple(None if self.spec.ln1 is None else cast(Norm, norm) for norm in self.ln1)
        inputs = head_inputs(x, points, self.spec, norms)
        attentions = zip(self.ln1, self.attn, self.ls1, inputs, strict=True)
        outs = [scale(attn(norm(x), rope, own, mask)) for norm, attn, scale, own in attentions]
        x = x + self.hook_attn_out(torch.stack(outs).sum(0))
        if self.spec.mlp is None:
            return self.hook_resid_post(x)
        x = self.hook_resid_mid(x)
        outs = [scale(mlp(norm(x))) for norm, mlp, scale in zip(self.ln2, self.mlp, self.ls2, strict=True)]
        return self.hook_resid_post(x + self.hook_mlp_out(torch.stack(outs).sum(0)))


def make_block(spec: BlockSpec, d_model: int, n_tokens: int, rope: RopeSpec | None) -> Block | SideBySide:
    """Return the block of a spec."""
    kind = Block if spec.n_parallel == 1 else SideBySide
    return kind(spec, d_model, n_tokens, rope)


def head_input_points(spec: BlockSpec) -> tuple[HookPoint, HookPoint, HookPoint]:
    """Return the hook points of what each head reads for its queries, keys and values."""
    grouped = "kv_head" if spec.attn.n_heads != spec.attn.n_kv_heads else "head"
    of_each = " of each attention" if spec.n_parallel > 1 else ""
    query, key, value = (
        HookPoint(f"batch pos {axis} d_model", f"resid_pre, once for each {kind} head{of_each}", derived=True)
        for kind, axis in (("query", "head"), ("key", grouped), ("value", grouped))
    )
    return query, key, value


def head_inputs(
    x: Tensor, points: tuple[HookPoint, HookPoint, HookPoint], spec: BlockSpec, norms: tuple[Norm | None, ...]
) -> list[HeadInputs]:
    """Return, for each attention, what each of its heads reads, where a scope asks for heads' own inputs.

    Args:
        x: the residual stream.
        points: hook points of the inputs of queries, keys and values, each with the heads of all attentions.
        norms: each attention's norm, None where it reads the stream as it is.
    """
    if not any(point.wanted for point in points):
        return [HeadInputs()] * len(norms)
    counts = (spec.attn.n_heads, spec.attn.n_kv_heads, spec.attn.n_kv_heads)
    columns: list[list[Tensor | None]] = []
    for point, n in zip(points, counts, strict=True):
        if not point.wanted:
            columns.append([None] * len(norms))
            continue
        own = torch.chunk(point(x.unsqueeze(2).expand(-1, -1, n * len(norms), -1).contiguous()), len(norms), dim=2)
        columns.append([part if norm is None else norm.fused(part) for part, norm in zip(own, norms, strict=True)])
    return [HeadInputs(*row) for row in zip(*columns, strict=True)]
