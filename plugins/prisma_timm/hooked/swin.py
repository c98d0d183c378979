"""Hook maps of timm's Swin transformers, the first and the second version: attention in windows that shift."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prisma_core.plugin import HookMap, MapSpec, Reader
from prisma_timm.canonical import common
from prisma_timm.hooked import mapping

GRID = "batch row column d_model"
HEADS = "(batch window) head pos d_head -> batch window pos head d_head"
SQUARE = "(batch window) head query_pos key_pos -> batch window head query_pos key_pos"


class SwinAdapter(mapping.FamilyMap):
    """Swin: norms before attention and MLP, a learned bias for each offset inside a window."""

    types = ("timm.models.swin_transformer.SwinTransformer",)
    small: ClassVar[Mapping[str, Any]] = {
        "img_size": (32, 48),
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 1),
        "num_heads": (2, 4),
    }

    def spec(self, upstream: Reader) -> MapSpec:
        patch = upstream.patch_embed
        rows, columns = patch.img_size
        others = () if patch.strict_img_size else ((rows + 2 * patch.patch_size[0], columns),)
        return mapping.facts(upstream, (rows, columns), *others)

    def stages(self, upstream: Reader) -> Iterator[tuple[str, str, Reader]]:
        """Yield for each stage what our names and upstream's begin with, and the stage."""
        for s, stage in enumerate(upstream.layers):
            yield f"stages.{s}", f"layers.{s}", stage

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        first = GRID if upstream.has("norm") else f"batch d_model row column -> {GRID}"
        rows = f"patch_embed  ->  hook_embed  : {first}  = patches W + b, normed\n"
        for at, source, stage in self.stages(upstream):
            if not stage.downsample.is_a("Identity"):
                rows += f"{source}.downsample  ->  {at}.hook_downsample  : {GRID}  = four neighbours, normed, W\n"
            for layer, block in enumerate(stage.blocks):
                rows += self.block(f"{source}.blocks.{layer}", f"{at}.blocks.{layer}", block)
        if upstream.has("norm"):
            rows += f"norm  ->  ln_final.hook_normalized  : {GRID}\n"
        return HookMap.parse(rows + mapping.head_rows(upstream.head))

    def block(self, source: str, at: str, block: Reader) -> str:
        """Return the rows of one block."""
        return f"""
            {source} : in         ->  {at}.hook_resid_pre      : {GRID}
            {source}.norm1        ->  {at}.ln1.hook_normalized : {GRID}  = ln(resid_pre)
            {self.attention(f"{source}.attn", f"{at}.attn", block.attn)}
            {source}.drop_path1   ->  {at}.hook_attn_out       : {GRID}
            {source} @ add        ->  {at}.hook_resid_mid      : {GRID}  = resid_pre + attn_out
            {source}.norm2        ->  {at}.ln2.hook_normalized : batch pos d_model  = ln(resid_mid)
            {mapping.mlp_rows(block, source, at)}
            {source}.drop_path2   ->  {at}.hook_mlp_out        : batch pos d_model
            {source}              ->  {at}.hook_resid_post     : {GRID}  = resid_mid + mlp_out
        """

    def attention(self, source: str, at: str, attn: Reader) -> str:
        """Return the rows of attention in windows."""
        fused = _fused(attn)
        if fused:
            inside = mapping.opened_rows(source, at, SQUARE)
        else:
            inside = mapping.pattern_rows(source, at, SQUARE, module=attn.has("softmax"))
        z = f"{source} @ {mapping.KERNEL}" if fused else f"{source} @ matmul#1"
        return f"""
            {source} @ unbind         ->  {at}.hook_q  : {HEADS}
            {source} @ unbind : out1  ->  {at}.hook_k  : {HEADS}
            {source} @ unbind : out2  ->  {at}.hook_v  : {HEADS}
            {inside}
            {z}                       ->  {at}.hook_z  : {HEADS}  = pattern v
        """

    def reference_places(self, upstream: Reader) -> HookMap:
        rows = [
            mapping.pattern_rows(f"{source}.{inside}", f"{at}.{inside}", SQUARE, module=block.attn.has("softmax"))
            for at, source, stage in self.stages(upstream)
            for layer, block in enumerate(stage.blocks)
            if _fused(block.attn)
            for inside in (f"blocks.{layer}.attn",)
        ]
        return HookMap.parse("\n".join(rows))

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Claim]:
        for at, _, stage in self.stages(upstream):
            for layer, block in enumerate(stage.blocks):
                yield from self.block_equations(f"{at}.blocks.{layer}", block, acts)

    def block_equations(self, at: str, block: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Claim]:
        """Yield what holds in one block."""
        q, k = acts[f"{at}.attn.hook_q"], acts[f"{at}.attn.hook_k"]
        yield mapping.same_bias(at, mapping.products(q, k) * block.attn.scale, acts)
        for norm, stream in (("ln1", "resid_pre"), ("ln2", "resid_mid")):
            normed, x = acts[f"{at}.{norm}.hook_normalized"], acts[f"{at}.hook_{stream}"]
            module = getattr(block, norm.replace("ln", "norm")).module
            yield f"{at}: {norm} = ln({stream})", normed.reshape(x.shape), module(x)
        yield from mapping.mlp_equations(at, block.module, acts[f"{at}.ln2.hook_normalized"], acts)
        yield f"{at}: mlp_out = post W_out + b_out", acts[f"{at}.hook_mlp_out"], mapping.mlp_out(block.module, acts, at)


def _fused(attn: Reader) -> bool:
    return bool(attn.get("fused_attn", False))


class SwinV2Adapter(SwinAdapter):
    """Swin V2: norms behind attention and MLP, cosines for scores."""

    types = ("timm.models.swin_transformer_v2.SwinTransformerV2",)

    def block(self, source: str, at: str, block: Reader) -> str:
        return f"""
            {source} : in         ->  {at}.hook_resid_pre      : {GRID}
            {self.attention(f"{source}.attn", f"{at}.attn", block.attn)}
            {source}.norm1        ->  {at}.ln1.hook_normalized : {GRID}  = ln(attention)
            {source}.drop_path1   ->  {at}.hook_attn_out       : {GRID}
            {source} @ add        ->  {at}.hook_resid_mid      : {GRID}  = resid_pre + attn_out
            {mapping.mlp_rows(block, source, at)}
            {source}.norm2        ->  {at}.ln2.hook_normalized : batch pos d_model  = ln(mlp)
            {source}.drop_path2   ->  {at}.hook_mlp_out        : batch pos d_model
            {source}              ->  {at}.hook_resid_post     : {GRID}  = resid_mid + mlp_out
        """

    def block_equations(self, at: str, block: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Claim]:
        q, k = (F.normalize(acts[f"{at}.attn.hook_{x}"], dim=-1) for x in "qk")
        scale = torch.clamp(block.attn.logit_scale, max=math.log(100)).exp().reshape(-1, 1, 1)
        yield mapping.same_bias(at, mapping.products(q, k) * scale, acts)
        yield f"{at}: attn_out = ln1", acts[f"{at}.hook_attn_out"], acts[f"{at}.ln1.hook_normalized"]
        yield from mapping.mlp_equations(at, block.module, acts[f"{at}.hook_resid_mid"].flatten(1, 2), acts)
        made = block.norm2.module(mapping.mlp_out(block.module, acts, at))
        yield f"{at}: mlp_out = ln2(post W_out + b_out)", acts[f"{at}.hook_mlp_out"], made


class SwinV2CrAdapter(SwinV2Adapter):
    """Swin V2 as Christoph Reich wrote it: some blocks end in a norm of the stream itself."""

    types = ("timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr",)

    def stages(self, upstream: Reader) -> Iterator[tuple[str, str, Reader]]:
        for s, stage in enumerate(upstream.stages):
            yield f"stages.{s}", f"stages.{s}", stage

    def block(self, source: str, at: str, block: Reader) -> str:
        rows = super().block(source, at, block)
        if block.norm3.is_a("Identity"):
            return rows
        extra = f"{source}.norm3  ->  {at}.ln3.hook_normalized  : batch pos d_model  = ln(resid_mid + mlp_out)"
        *before, last = rows.rstrip().splitlines()
        return "\n".join([*before, extra, last.replace("resid_mid + mlp_out", "ln3.normalized"), ""])

    def block_equations(self, at: str, block: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Claim]:
        yield from super().block_equations(at, block, acts)
        if f"{at}.ln3.hook_normalized" in acts:
            out, post = acts[f"{at}.hook_mlp_out"], acts[f"{at}.hook_resid_post"]
            made = block.norm3.module(acts[f"{at}.hook_resid_mid"] + out.reshape(post.shape))
            yield f"{at}: resid_post = ln3(resid_mid + mlp_out)", post, made
            normed = acts[f"{at}.ln3.hook_normalized"]
            yield f"{at}: resid_post = ln3.normalized", post, normed.reshape(post.shape)
