"""The hook map of timm's Hiera: attention in mask units, queries pooled where a stage begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from prisma_core.plugin import HookMap, MapSpec, Reader
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
            patch_embed  ->  hook_embed       : {TOKENS}
            unroll : in  ->  hook_full_embed  : {TOKENS}  = embed + pos_embed
        """
        for layer, block in enumerate(upstream.blocks):
            rows += _block(f"blocks.{layer}", block)
        rows += """
            head.norm : in  ->  hook_pooled              : batch d_model  = mean over tokens
            head.norm       ->  ln_pool.hook_normalized  : batch d_model  = ln(pooled)
        """
        if not upstream.head.pool_type:
            raise upstream.head.unsupported("a head without pooling")
        return HookMap.parse(rows + mapping.hidden_row(upstream.head) + "head.fc -> hook_logits : batch class")

    def reference_places(self, upstream: Reader) -> HookMap:
        rows = [
            mapping.pattern_rows(f"blocks.{layer}.attn", f"blocks.{layer}.attn", _square(block.attn))
            for layer, block in enumerate(upstream.blocks)
            if block.attn.fused_attn
        ]
        return HookMap.parse("\n".join(rows))

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Claim]:
        for layer, block in enumerate(upstream.blocks):
            at = f"blocks.{layer}"
            q, k = acts[f"{at}.attn.hook_q"], acts[f"{at}.attn.hook_k"]
            scores = mapping.products(q, k) * block.attn.scale
            yield f"{at}: scores = q . k * scale", acts[f"{at}.attn.hook_attn_scores"], scores
            for norm, stream in (("1", "resid_pre"), ("2", "resid_mid")):
                made = getattr(block, f"norm{norm}").module(acts[f"{at}.hook_{stream}"])
                yield f"{at}: ln{norm} = ln({stream})", acts[f"{at}.ln{norm}.hook_normalized"], made
            yield from mapping.mlp_equations(at, block.module, acts[f"{at}.ln2.hook_normalized"], acts)
            made = block.ls2.module(mapping.mlp_out(block.module, acts, at))
            yield f"{at}: mlp_out = ls2(post W_out + b_out)", acts[f"{at}.hook_mlp_out"], made


def _window(attn: Reader) -> str:
    return "window " if attn.use_mask_unit_attn else ""


def _square(attn: Reader) -> str:
    window = _window(attn)
    return f"batch head {window}query_pos key_pos -> batch {window}head query_pos key_pos"


def _block(at: str, block: Reader) -> str:
    attn, window = block.attn, _window(block.attn)
    heads = f"batch head {window}pos d_head -> batch {window}pos head d_head"
    if attn.fused_attn:
        q, k, v, z = (f"{at}.attn @ {mapping.KERNEL} : {side}" for side in ("in", "in1", "in2", "out"))
        inside = mapping.opened_rows(f"{at}.attn", f"{at}.attn", _square(attn))
    else:
        places = ("mul : in", "transpose : in", "matmul#1 : in1", "matmul#1")
        q, k, v, z = (f"{at}.attn @ {place}" for place in places)
        inside = mapping.pattern_rows(f"{at}.attn", f"{at}.attn", _square(attn))
    v_row = f"{v}  ->  {at}.attn.hook_v  : {heads}"
    shortcut = f"{at} @ add : in  ->  {at}.hook_shortcut  : {TOKENS}  = resid_pre, pooled and widened"
    return f"""
        {at} : in        ->  {at}.hook_resid_pre       : {TOKENS}
        {at}.norm1       ->  {at}.ln1.hook_normalized  : {TOKENS}  = ln(resid_pre)
        {q}              ->  {at}.attn.hook_q          : {heads}  = x W_Q + b_Q, the largest of those pooled
        {k}              ->  {at}.attn.hook_k          : {heads}
        {v_row if attn.fused_attn else ""}
        {inside}
        {"" if attn.fused_attn else v_row}
        {z}              ->  {at}.attn.hook_z          : {heads}  = pattern v
        {at}.drop_path1  ->  {at}.hook_attn_out        : {TOKENS}
        {shortcut if block.do_expand else ""}
        {at} @ add       ->  {at}.hook_resid_mid       : {TOKENS}  = resid_pre (or shortcut) + attn_out
        {at}.norm2       ->  {at}.ln2.hook_normalized  : {TOKENS}  = ln(resid_mid)
        {mapping.mlp_rows(block, at, at)}
        {at}.drop_path2  ->  {at}.hook_mlp_out         : {TOKENS}
        {at}             ->  {at}.hook_resid_post      : {TOKENS}  = resid_mid + mlp_out
    """
