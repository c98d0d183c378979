"""The hook map of timm's SAM encoders: attention in windows, a bias that depends on the queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from torch import Tensor, nn

from prisma_core.plugin import FUSED, HookMap, MapSpec, Reader, products, score_rows
from prisma_timm.canonical import common
from prisma_timm.hooked import mapping

GRID = "batch row column d_model"
MAPS = "batch d_model row column -> batch row column d_model"


class SamAdapter(mapping.FamilyMap):
    """SAM's image encoder, in windows and, in some blocks, over the whole image."""

    types = ("timm.models.vision_transformer_sam.VisionTransformerSAM",)
    small: ClassVar[Mapping[str, Any]] = {
        "img_size": (64, 96),
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 3,
        "window_size": 3,
        "global_attn_indexes": (1,),
        "neck_chans": 10,
    }

    def spec(self, upstream: Reader) -> MapSpec:
        return mapping.facts(upstream, upstream.patch_embed.img_size)

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        rows = f"""
            patch_embed    ->  hook_embed       : {GRID}  = patch_embed(input)
            norm_pre : in  ->  hook_full_embed  : {GRID}  = embed{" + pos_embed" if upstream.has("pos_embed") else ""}
        """
        if not upstream.norm_pre.is_a("Identity"):
            rows += f"norm_pre  ->  ln_pre.hook_normalized  : {GRID}  = norm_pre(full_embed)\n"
        for layer, block in enumerate(upstream.blocks):
            rows += _block(f"blocks.{layer}", block)
        rows += f"neck  ->  hook_neck  : {MAPS}  = neck(blocks.{len(upstream.blocks) - 1}.resid_post)\n"
        heads = upstream.blocks[0].attn.num_heads
        return HookMap.parse(rows + mapping.head_rows(upstream.head, "neck"), head=heads)

    def reference_places(self, upstream: Reader) -> HookMap:
        rows = [
            score_rows(f"blocks.{layer}.attn", f"blocks.{layer}.attn", _square(block), fused=False)
            for layer, block in enumerate(upstream.blocks)
            if block.attn.fused_attn
        ]
        return HookMap.parse("\n".join(rows), head=upstream.blocks[0].attn.num_heads)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Equation]:
        for layer, block in enumerate(upstream.blocks):
            yield _scores(f"blocks.{layer}", block, acts)


def _scores(at: str, block: Reader, acts: Mapping[str, Tensor]) -> mapping.Equation:
    """Equation of scores: products, and a bias that the queries and the distances in rows and columns make."""
    from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

    attn = block.attn
    turned = "rot_" if f"{at}.attn.hook_rot_q" in acts else ""
    q, k = (acts[f"{at}.attn.hook_{turned}{x}"] for x in "qk")
    scores = products(q, k) * attn.scale
    if attn.use_rel_pos:
        side = (block.window_size, block.window_size) if block.window_size else acts[f"{at}.hook_resid_pre"].shape[1:3]
        flat = q.transpose(-2, -3).reshape(-1, q.shape[-3], q.shape[-1])
        bias = get_decomposed_rel_pos_bias(flat, attn.rel_pos_h, attn.rel_pos_w, tuple(side), tuple(side))
        scores = scores + bias.reshape(scores.shape)
    return f"{at}: scores = q . k * scale + bias(q)", acts[f"{at}.attn.hook_attn_scores"], scores


def _window(block: Reader) -> str:
    return "window " if block.window_size else ""


def _square(block: Reader) -> str:
    window = _window(block)
    return f"(batch {window}head) query_pos key_pos -> batch {window}head query_pos key_pos"


def _block(at: str, block: Reader) -> str:
    attn, window = block.attn, _window(block)
    heads = f"(batch {window}head) pos d_head -> batch {window}pos head d_head"
    if not attn.fused_attn:
        raise attn.unsupported("attention set to run step by step; build the model with fused attention")
    rotated = ""
    if attn.has("rope"):
        rotated = f"""
            {at}.attn @ {FUSED} : in   ->  {at}.attn.hook_rot_q  : {heads}  = q turned by its position
            {at}.attn @ {FUSED} : in1  ->  {at}.attn.hook_rot_k  : {heads}  = k turned by its position
        """
    return f"""
        {at} : in        ->  {at}.hook_resid_pre       : {GRID}
        {at}.norm1       ->  {at}.ln1.hook_normalized  : {GRID}  = {at}.norm1(resid_pre)
        {at}.attn.q_norm ->  {at}.attn.hook_q          : {heads}
        {at}.attn.k_norm ->  {at}.attn.hook_k          : {heads}
        {rotated}
        {at}.attn @ {FUSED} : in2  ->  {at}.attn.hook_v  : {heads}
        {score_rows(f"{at}.attn", f"{at}.attn", _square(block), fused=True)}
        {at}.attn @ {FUSED}        ->  {at}.attn.hook_z  : {heads}  = pattern v
        {at} @ add : in1 ->  {at}.hook_attn_out        : {GRID}
        {at} @ add       ->  {at}.hook_resid_mid       : {GRID}  = resid_pre + attn_out
        {at}.norm2       ->  {at}.ln2.hook_normalized  : batch pos d_model  = {at}.norm2(resid_mid)
        {mapping.mlp_rows(block, at, at, "ln2.normalized")}
        {at}.drop_path2  ->  {at}.hook_mlp_out         : batch pos d_model  = {at}.ls2({at}.mlp.fc2(mlp.post))
        {at}             ->  {at}.hook_resid_post      : {GRID}  = resid_mid + mlp_out
    """
