"""Hook maps of timm's Swin transformers, the first and the second version: attention in windows that shift."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prisma_core.plugin import FUSED, HookMap, MapSpec, Reader, argument, products, same_bias, score_rows
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
        rows, x = f"patch_embed  ->  hook_embed  : {first}  = patch_embed(input)\n", "embed"
        for at, source, stage in self.stages(upstream):
            if not stage.downsample.is_a("Identity"):
                rows += f"{source}.downsample  ->  {at}.hook_downsample  : {GRID}  = {source}.downsample({x})\n"
            for layer, block in enumerate(stage.blocks):
                rows += self.block(f"{source}.blocks.{layer}", f"{at}.blocks.{layer}", block)
                x = f"{at}.blocks.{layer}.resid_post"
        if upstream.has("norm"):
            rows += f"norm  ->  ln_final.hook_normalized  : {GRID}  = norm({x})\n"
            x = "ln_final.normalized"
        return HookMap.parse(rows + mapping.head_rows(upstream.head, x))

    def block(self, source: str, at: str, block: Reader) -> str:
        """Write the rows of one block."""
        return f"""
            {source} : in         ->  {at}.hook_resid_pre      : {GRID}
            {source}.norm1        ->  {at}.ln1.hook_normalized : {GRID}  = {source}.norm1(resid_pre)
            {self.attention(f"{source}.attn", f"{at}.attn", block.attn)}
            {source}.drop_path1   ->  {at}.hook_attn_out       : {GRID}
            {source} @ add        ->  {at}.hook_resid_mid      : {GRID}  = resid_pre + attn_out
            {source}.norm2        ->  {at}.ln2.hook_normalized : batch pos d_model  = {source}.norm2(resid_mid)
            {mapping.mlp_rows(block, source, at, "ln2.normalized")}
            {source}.drop_path2   ->  {at}.hook_mlp_out        : batch pos d_model  = {source}.mlp.fc2(mlp.post)
            {source}              ->  {at}.hook_resid_post     : {GRID}  = resid_mid + mlp_out
        """

    def attention(self, source: str, at: str, attn: Reader) -> str:
        """Write the rows of attention in windows."""
        fused = _fused(attn)
        z = f"{source} @ {FUSED}" if fused else f"{source} @ matmul#1"
        return f"""
            {source} @ unbind         ->  {at}.hook_q  : {HEADS}
            {source} @ unbind : out1  ->  {at}.hook_k  : {HEADS}
            {source} @ unbind : out2  ->  {at}.hook_v  : {HEADS}
            {score_rows(source, at, SQUARE, fused=fused, softmax=_softmax(attn))}
            {z}                       ->  {at}.hook_z  : {HEADS}  = pattern v
        """

    def reference_places(self, upstream: Reader) -> HookMap:
        rows = [
            score_rows(f"{source}.{inside}", f"{at}.{inside}", SQUARE, fused=False, softmax=_softmax(block.attn))
            for at, source, stage in self.stages(upstream)
            for layer, block in enumerate(stage.blocks)
            if _fused(block.attn)
            for inside in (f"blocks.{layer}.attn",)
        ]
        return HookMap.parse("\n".join(rows))

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[mapping.Equation]:
        for s, _, stage in self.stages(upstream):
            for layer, block in enumerate(stage.blocks):
                at = f"{s}.blocks.{layer}.attn"
                q, k, v = (acts[f"{at}.hook_{name}"] for name in "qkv")
                yield same_bias(at, self.products(q, k, block.attn), acts)
                # Cosines do not change where queries and keys are normed first, so scores do not prove these.
                windows = argument(block.module, "attn", acts[f"{s}.blocks.{layer}.hook_resid_pre"])
                parts = rearrange(_projected(block.attn, windows), "n p (t h d) -> t n p h d", t=3, h=q.shape[-2])
                yield f"{at}: q, k, v = qkv(windows of resid_pre)", torch.stack([q, k, v]).flatten(1, 2), parts

    def products(self, q: Tensor, k: Tensor, attn: Reader) -> Tensor:
        """Scaled products of queries and keys ``[... pos head d_head]``."""
        return products(q, k) * attn.scale


def _projected(attn: Reader, x: Tensor) -> Tensor:
    if attn.qkv.bias is None and attn.get("q_bias") is not None:
        return F.linear(x, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    return F.linear(x, attn.qkv.weight, attn.qkv.bias)


def _fused(attn: Reader) -> bool:
    return bool(attn.get("fused_attn", False))


def _softmax(attn: Reader) -> str:
    return ".softmax" if attn.has("softmax") else " @ softmax"


class SwinV2Adapter(SwinAdapter):
    """Swin V2: norms behind attention and MLP, cosines for scores."""

    types = ("timm.models.swin_transformer_v2.SwinTransformerV2",)

    def block(self, source: str, at: str, block: Reader) -> str:
        mlp = f"{source}.norm2({source}.mlp.fc2(mlp.post))"
        return f"""
            {source} : in         ->  {at}.hook_resid_pre      : {GRID}
            {self.attention(f"{source}.attn", f"{at}.attn", block.attn)}
            {source}.norm1        ->  {at}.ln1.hook_normalized : {GRID}  = ln(attention)
            {source}.drop_path1   ->  {at}.hook_attn_out       : {GRID}  = ln1.normalized
            {source} @ add        ->  {at}.hook_resid_mid      : {GRID}  = resid_pre + attn_out
            {mapping.mlp_rows(block, source, at, "resid_mid")}
            {source}.norm2        ->  {at}.ln2.hook_normalized : batch pos d_model  = {mlp}
            {source}.drop_path2   ->  {at}.hook_mlp_out        : batch pos d_model  = ln2.normalized
            {source}              ->  {at}.hook_resid_post     : {GRID}  = resid_mid + mlp_out
        """

    def products(self, q: Tensor, k: Tensor, attn: Reader) -> Tensor:
        scale = torch.clamp(attn.logit_scale, max=math.log(100)).exp().reshape(-1, 1, 1)
        return products(F.normalize(q, dim=-1), F.normalize(k, dim=-1)) * scale


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
        formula = f"{source}.norm3(resid_mid + mlp_out)"
        extra = f"{source}.norm3  ->  {at}.ln3.hook_normalized  : batch pos d_model  = {formula}"
        *before, last = rows.rstrip().splitlines()
        return "\n".join([*before, extra, last.replace("resid_mid + mlp_out", "ln3.normalized"), ""])

    def exempt(self, upstream: Reader) -> dict[str, str]:
        return {
            f"{at}.blocks.{layer}.hook_resid_post = resid_mid + mlp_out": "the block ends in a norm of the stream"
            for at, _, stage in self.stages(upstream)
            for layer, block in enumerate(stage.blocks)
            if not block.norm3.is_a("Identity")
        }
