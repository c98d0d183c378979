"""Transformer blocks: attention and MLP, and how their outputs join the residual stream."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from prisma_core.hooks import HookPoint
from prisma_core.spec import BlockSpec, RopeSpec
from prisma_core.transformer.attention import Attention, HeadInputs, Rope
from prisma_core.transformer.mlp import MLP
from prisma_core.transformer.norm import Norm, Scale, norm_or_identity

STREAM = "batch pos d_model"


class Block(nn.Module):
    """One block that adds attention, then MLP, to the residual stream.

    ``hook_attn_out`` and ``hook_mlp_out`` are always what is added to the stream, after any norm and layer scale.
    """

    def __init__(self, spec: BlockSpec, d_model: int, n_tokens: int, rope: RopeSpec | None):
        super().__init__()
        self.spec = spec
        self.hook_resid_pre = HookPoint(STREAM, "the stream before the block")
        heads = "batch pos head d_model"
        kv_heads = heads if spec.attn.n_heads == spec.attn.n_kv_heads else "batch pos kv_head d_model"
        self.hook_q_input = HookPoint(heads, "resid_pre, once for each query head", derived=True)
        self.hook_k_input = HookPoint(kv_heads, "resid_pre, once for each key head", derived=True)
        self.hook_v_input = HookPoint(kv_heads, "resid_pre, once for each value head", derived=True)
        self.ln1 = norm_or_identity(spec.ln1, d_model)
        self.attn = Attention(spec.attn, d_model, n_tokens, rope)
        self.ls1 = Scale(d_model) if spec.attn_scale else nn.Identity()
        self.hook_attn_out = HookPoint(STREAM, "what attention adds to the stream")
        if spec.mlp is not None:
            if spec.kind != "parallel":
                self.hook_resid_mid = HookPoint(STREAM, "resid_pre + attn_out")
                self.ln2 = norm_or_identity(spec.ln2, d_model)
            self.mlp = MLP(spec.mlp, d_model, d_model)
            self.ls2 = Scale(d_model) if spec.mlp_scale else nn.Identity()
            self.hook_mlp_out = HookPoint(STREAM, "what the MLP adds to the stream")
        before = "resid_mid" if spec.kind != "parallel" else "resid_pre + attn_out"
        self.hook_resid_post = HookPoint(STREAM, f"{before} + mlp_out" if spec.mlp else "resid_pre + attn_out")

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        x = self.hook_resid_pre(x)
        if self.spec.kind == "parallel":
            normed = self.ln1(x)
            attn_out = self.hook_attn_out(self.ls1(self.attn(normed, rope, self._inputs(x))))
            mlp_out = self.hook_mlp_out(self.ls2(self.mlp(normed)))
            return self.hook_resid_post(x + attn_out + mlp_out)
        if self.spec.kind == "res_post":
            attn_out = self.hook_attn_out(self.ls1(self.ln1(self.attn(x, rope, self._inputs(x)))))
        else:
            attn_out = self.hook_attn_out(self.ls1(self.attn(self.ln1(x), rope, self._inputs(x))))
        x = x + attn_out
        if self.spec.mlp is None:
            return self.hook_resid_post(x)
        x = self.hook_resid_mid(x)
        if self.spec.kind == "res_post":
            return self.hook_resid_post(x + self.hook_mlp_out(self.ls2(self.ln2(self.mlp(x)))))
        return self.hook_resid_post(x + self.hook_mlp_out(self.ls2(self.mlp(self.ln2(x)))))

    def _inputs(self, x: Tensor) -> HeadInputs:
        points = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        if not any(point.wanted for point in points):
            return HeadInputs()
        counts = (self.attn.spec.n_heads, self.attn.spec.n_kv_heads, self.attn.spec.n_kv_heads)
        return HeadInputs(*(self._input(x, point, n) for point, n in zip(points, counts, strict=True)))

    def _input(self, x: Tensor, point: HookPoint, n: int) -> Tensor | None:
        if not point.wanted:
            return None
        own = point(x.unsqueeze(2).expand(-1, -1, n, -1).contiguous())
        if self.spec.kind == "res_post" or self.spec.ln1 is None:
            return own
        return cast(Norm, self.ln1).fused(own)
