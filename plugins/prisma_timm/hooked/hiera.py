"""The hook map of timm's Hiera: attention in mask units, queries pooled where a stage begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor, nn

from prisma_core.plugin import FUSED, HookMap, MapSpec, Reader, score_rows
from prisma_timm.canonical import common
from prisma_timm.hooked import mapping

TOKENS = "batch pos d_model"


class HieraAdapter(mapping.FamilyMap):
    """Hiera. Tokens stand in the order of the mask units they belong to, coarser where queries were pooled."""

    types = ("timm.models.hiera.Hiera",)
    small: ClassVar[Mapping[str, Any]] = {
        "img_size": (64, 96),
        "embed_dim": 16,
        "num_heads": 1,
        "stages": (1, 2, 1),
        "q_pool": 1,
        "mask_unit_size": (4, 4),
        "mask_unit_attn": (True, True, False),
    }

    def spec(self, upstream: Reader) -> MapSpec:
        grid, stride = upstream.tokens_spatial_shape, upstream.patch_stride
        return mapping.facts(upstream, tuple(n * step for n, step in zip(grid, stride, strict=True)))

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        rows = f"""
            patch_embed  ->  hook_embed       : {TOKENS}  = patch_embed(input)
            unroll : in  ->  hook_full_embed  : {TOKENS}  = embed, and positions
        """
        for layer, block in enumerate(upstream.blocks):
            rows += _block(f"blocks.{layer}", block, "unroll(full_embed)" if layer == 0 else "")
        pool = upstream.head.pool_type
        if not pool:
            raise upstream.head.unsupported("a head without pooling")
        last = f"blocks.{len(upstream.blocks) - 1}.resid_post"
        rows += f"""
            head.norm : in  ->  hook_pooled              : batch d_model  = {"mean" if pool == "avg" else pool}({last})
            head.norm       ->  ln_pool.hook_normalized  : batch d_model  = head.norm(pooled)
        """
        return HookMap.parse(rows + mapping.classifier_rows(upstream.head))

    def reference_places(self, upstream: Reader) -> HookMap:
        rows = [
            score_rows(f"blocks.{layer}.attn", f"blocks.{layer}.attn", _square(block.attn), fused=False)
            for layer, block in enumerate(upstream.blocks)
            if block.attn.fused_attn
        ]
        return HookMap.parse("\n".join(rows))

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Equation]:
        # Where queries are pooled, resid_mid is a sum of two parts of which nothing else reads either.
        for layer, block in enumerate(upstream.blocks):
            z = acts[f"blocks.{layer}.attn.hook_z"]
            tokens = rearrange(z, "b w p h d -> b (p w) (h d)" if z.ndim == 5 else "b p h d -> b p (h d)")
            out = block.ls1.module(block.attn.proj.module(tokens))
            yield f"blocks.{layer}.hook_attn_out = ls1(attn.proj(attn.z))", acts[f"blocks.{layer}.hook_attn_out"], out

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)


def _window(attn: Reader) -> str:
    return "window " if attn.use_mask_unit_attn else ""


def _square(attn: Reader) -> str:
    window = _window(attn)
    return f"batch head {window}query_pos key_pos -> batch {window}head query_pos key_pos"


def _block(at: str, block: Reader, stream: str) -> str:
    """Write the rows of a block; ``stream`` is the formula of what comes to it, where the block before does not say."""
    attn, window = block.attn, _window(block.attn)
    heads = f"batch head {window}pos d_head -> batch {window}pos head d_head"
    if attn.fused_attn:
        q, k, v, z = (f"{at}.attn @ {FUSED} : {side}" for side in ("in", "in1", "in2", "out"))
    else:
        places = ("mul : in", "transpose : in", "matmul#1 : in1", "matmul#1")
        q, k, v, z = (f"{at}.attn @ {place}" for place in places)
    scores = f"q . k * {at}.attn.scale"
    inside = score_rows(f"{at}.attn", f"{at}.attn", _square(attn), fused=attn.fused_attn, scores=scores)
    v_row = f"{v}  ->  {at}.attn.hook_v  : {heads}"
    shortcut = f"{at} @ add : in  ->  {at}.hook_shortcut  : {TOKENS}  = resid_pre, pooled and widened"
    return f"""
        {at} : in        ->  {at}.hook_resid_pre       : {TOKENS}{f"  = {stream}" if stream else ""}
        {at}.norm1       ->  {at}.ln1.hook_normalized  : {TOKENS}  = {at}.norm1(resid_pre)
        {q}              ->  {at}.attn.hook_q          : {heads}  = x W_Q + b_Q, the largest of those pooled
        {k}              ->  {at}.attn.hook_k          : {heads}
        {v_row if attn.fused_attn else ""}
        {inside}
        {"" if attn.fused_attn else v_row}
        {z}              ->  {at}.attn.hook_z          : {heads}  = pattern v
        {at}.drop_path1  ->  {at}.hook_attn_out        : {TOKENS}
        {shortcut if block.do_expand else ""}
        {at} @ add       ->  {at}.hook_resid_mid       : {TOKENS}  = resid_pre (or shortcut) + attn_out
        {at}.norm2       ->  {at}.ln2.hook_normalized  : {TOKENS}  = {at}.norm2(resid_mid)
        {mapping.mlp_rows(block, at, at, "ln2.normalized")}
        {at}.drop_path2  ->  {at}.hook_mlp_out         : {TOKENS}  = {at}.ls2({at}.mlp.fc2(mlp.post))
        {at}             ->  {at}.hook_resid_post      : {TOKENS}  = resid_mid + mlp_out
    """
