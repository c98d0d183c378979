"""The adapter of transformers' image encoders: one reading of facts, given where each class keeps its parts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

from torch import nn

from prisma_core.adapter import Adapter, Reader, qualified_name
from prisma_core.hookmap import HookMap
from prisma_core.layout import TokenLayout
from prisma_core.spec import EmbedSpec, Interpolation, ModelSpec, PoolSpec
from prisma_core.weights import WeightMap
from prisma_hf import blocks, parts
from prisma_hf.classes import MODELS
from prisma_hf.names import ModelNames, TowerNames


class EncoderAdapter(Adapter):
    """Plain encoders, alone or with a classifier."""

    types = tuple(MODELS)
    ignored: ClassVar[Mapping[str, str]] = parts.IGNORED

    def spec(self, upstream: Reader) -> ModelSpec:
        names = MODELS[qualified_name(upstream.module)]
        tower = parts.walk(upstream, names.at)
        proj = parts.walk(tower, names.tower.proj)
        layout = _layout(tower, names.tower)
        classes = _classes(upstream, names)
        return ModelSpec(
            d_model=proj.out_channels,
            image_size=_image_size(tower, names.tower),
            embed=_embed(tower, names.tower, layout),
            layout=layout,
            blocks=tuple(blocks.block(block, names.tower.block) for block in parts.walk(tower, names.tower.blocks)),
            ln_pre=parts.norm(parts.walk(tower, names.tower.ln_pre)) if names.tower.ln_pre else None,
            ln_final=parts.norm(parts.walk(tower, names.tower.ln_final)) if names.tower.ln_final else None,
            pool=_pool(names),
            ln_pool=parts.norm(parts.walk(upstream, names.ln_pool)) if names.ln_pool else None,
            d_pool=proj.out_channels,
            n_classes=classes,
            n_heads_out=2 if names.head_dist else 1,
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        names = MODELS[qualified_name(upstream.module)]
        tower, at = parts.walk(upstream, names.at), _prefixed(names.at)
        rows = parts.linear_rows(f"{at}{names.tower.proj}", "embed.proj")
        if names.tower.prefix:
            tokens = ", ".join(f"{at}{path}" for _, path in names.tower.prefix)
            rows += f"[{tokens}]  ->  embed.prefix  : 1 n d -> n d\n"
        rows += f"{at}{names.tower.pos}  ->  embed.pos_embed  : 1 p d -> p d\n"
        for source, target in ((names.tower.ln_pre, "ln_pre"), (names.tower.ln_final, "ln_final")):
            rows += parts.norm_rows(f"{at}{source}", target) if source else ""
        rows += blocks.rows(parts.walk(tower, names.tower.blocks), f"{at}{names.tower.blocks}", names.tower.block)
        rows += parts.norm_rows(names.ln_pool, "ln_pool") if names.ln_pool else ""
        rows += parts.linear_rows(names.head, "head") if names.head else ""
        rows += parts.linear_rows(names.head_dist, "head_dist") if names.head_dist else ""
        for key, reason in names.tower.ignored.items():
            rows += f"ignore {at}{key} : {reason}\n"
        for key, reason in names.ignored.items():
            rows += f"ignore {key} : {reason}\n"
        return WeightMap.parse(rows)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        names = MODELS[qualified_name(upstream.module)]
        tower, at = parts.walk(upstream, names.at), _prefixed(names.at)
        first = f"{at}{names.tower.blocks}.0 : in"
        rows = f"""
            {at}{names.tower.proj}  ->  hook_embed  : b d r c -> b (r c) d
            {f"{at}{names.tower.ln_pre} : in" if names.tower.ln_pre else first}  ->  hook_full_embed
        """
        rows += blocks.hooks(parts.walk(tower, names.tower.blocks), f"{at}{names.tower.blocks}", names.tower.block)
        if names.tower.ln_pre:
            rows += f"""
                {at}{names.tower.ln_pre}  ->  ln_pre.hook_normalized
                {at}{names.tower.ln_pre}  ->  hook_ln_pre
            """
        if spec.ln_final is not None:
            rows += f"""
                {at}{names.tower.ln_final}  ->  ln_final.hook_normalized
                {at}{names.tower.ln_final}  ->  hook_ln_final
            """
        last = f"{at}{names.tower.ln_final}" if spec.ln_final is not None else f"{at}{names.tower.blocks}.{{l}}"
        if names.ln_pool:
            rows += f"""
                {names.ln_pool} : in  ->  hook_pooled
                {names.ln_pool}       ->  ln_pool.hook_normalized
            """
        elif names.head:
            rows += f"{names.head} : in  ->  hook_pooled\n"
        else:
            rows += f"{last}  ->  hook_pooled\n"
        if names.head_dist:
            rows += f"""
                {names.head_dist} : in  ->  hook_pooled_dist
                 @ truediv              ->  hook_logits
            """
        else:
            rows += f"{names.head or last}  ->  hook_logits\n"
        return HookMap.parse(rows, h=spec.blocks[0].attn.n_heads)

    def explicit(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return parts.explicit_attention(upstream)


def _prefixed(path: str) -> str:
    return f"{path}." if path else ""


def _image_size(tower: Reader, names: TowerNames) -> tuple[int, int]:
    size = parts.walk(tower, names.image)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _layout(tower: Reader, names: TowerNames) -> TokenLayout:
    height, width = _image_size(tower, names)
    down, across = parts.walk(tower, names.proj).kernel_size
    counts = {kind: parts.walk(tower, path).shape[1] for kind, path in names.prefix}
    return TokenLayout(**counts, rows=height // down, columns=width // across)


def _embed(tower: Reader, names: TowerNames, layout: TokenLayout) -> EmbedSpec:
    proj = parts.walk(tower, names.proj)
    parts.plain_patches(proj)
    # Upstream takes the root of the number of positions for a side of their grid, and one number for a patch's sides.
    square = layout.rows == layout.columns and isinstance(parts.walk(tower, names.side), int)
    how = Interpolation(antialias=False, in_float32=names.resize_float32)
    return EmbedSpec(
        patch=proj.kernel_size,
        in_channels=proj.in_channels,
        pos=True,
        interpolation=how if square and names.resize != "never" else None,
    )


def _classes(upstream: Reader, names: ModelNames) -> int | None:
    if not names.head:
        return None
    head = parts.walk(upstream, names.head)
    return None if head.is_a("torch.nn.modules.linear.Identity") else parts.linear(head).out_features


def _pool(names: ModelNames) -> PoolSpec:
    if names.pool == "avg_all":
        return PoolSpec(kind="avg", with_prefix=True)
    return PoolSpec(kind=names.pool)
