"""The adapter of transformers' image encoders: one reading of facts, given where each class keeps its parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import ClassVar

from torch import Tensor, nn

from prisma_core.plugin import (
    Adapter,
    EmbedSpec,
    HookMap,
    ModelSpec,
    PoolSpec,
    Reader,
    TokenLayout,
    WeightMap,
    ends_with_last_stage,
    linear_rows,
    norm_rows,
    plain_patches,
    qualified_name,
)
from prisma_hf.canonical import bias, blocks, calling, parts, positions, rotary
from prisma_hf.canonical import listed as lists
from prisma_hf.canonical.classes import MODELS
from prisma_hf.canonical.names import ModelNames, TowerNames


class EncoderAdapter(Adapter):
    """Plain encoders, alone or with a classifier."""

    types = tuple(MODELS)
    ignored: ClassVar[Mapping[str, str]] = parts.IGNORED

    def spec(self, upstream: Reader) -> ModelSpec:
        names = MODELS[qualified_name(upstream.module)]
        tower = parts.at(upstream, names.at)
        for path, feature in names.tower.refused.items():
            if parts.at(tower, path):
                raise tower.unsupported(feature)
        if upstream.has("out_features"):
            ends_with_last_stage(upstream, parts.at(tower, names.tower.blocks))
        layout = _layout(tower, names.tower)
        width = _width(tower, names.tower)
        ln_final = _ln_final(tower, names.tower)
        classes = _classes(upstream, names)
        if names.head_dist:
            parts.linear(parts.at(upstream, names.head_dist))
        ln_pool = parts.at(upstream, names.ln_pool) if names.ln_pool else None
        return ModelSpec(
            d_model=width,
            image_size=_image_size(tower, names.tower),
            embed=_embed(tower, names.tower, layout),
            layout=layout,
            blocks=tuple(
                blocks.block(block, names.tower.block, bias.shared(tower, names.tower))
                for block in parts.at(tower, names.tower.blocks)
            ),
            rope=rotary.spec(tower, names.tower),
            ln_pre=parts.norm(parts.at(tower, names.tower.ln_pre)) if names.tower.ln_pre else None,
            ln_final=parts.norm(parts.at(tower, ln_final)) if ln_final else None,
            pool=_pool(names, averaged=ln_pool is not None),
            ln_pool=None if ln_pool is None else parts.norm(ln_pool),
            d_pool=width,
            n_classes=classes,
            n_heads_out=2 if names.head_dist else 1,
        )

    def stem(self, upstream: Reader, spec: ModelSpec) -> nn.Module | None:
        names = MODELS[qualified_name(upstream.module)]
        tower = parts.at(upstream, names.at)
        return parts.at(tower, names.tower.stem).module if names.tower.stem else None

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        names = MODELS[qualified_name(upstream.module)]
        tower, at = parts.at(upstream, names.at), _prefixed(names.at)
        rows = f"{at}{names.tower.stem}.{{*}}  ->  embed.stem.{{*}}\n"
        if not names.tower.stem:
            pixels = f": m ({names.tower.flat}) -> m c p q" if names.tower.flat else ""
            pixels = ": {one_frame}" if names.tower.listed == "frames" else pixels
            rows = f"""
                {at}{names.tower.proj}.weight        ->  embed.proj.weight  {pixels}
                {at}{names.tower.proj}.bias | zeros  ->  embed.proj.bias
            """
        if names.tower.prefix and not spec.layout.n_prefix:
            rows += "".join(f"ignore {at}{path} : holds no token\n" for _, path in names.tower.prefix)
        elif names.tower.prefix:
            tokens = ", ".join(f"{at}{path}" for _, path in names.tower.prefix)
            flat = parts.at(tower, names.tower.prefix[0][1]).ndim == 1
            rows += f"[{tokens}]  ->  embed.prefix  : {'d -> 1 d' if flat else '1 n d -> n d'}\n"
        added, functions = positions.rows(tower, at, names.tower, spec.layout)
        turned, turning = rotary.rows(tower, at, names.tower, spec.layout, spec.image_size)
        rows += added + turned
        rows += norm_rows(f"{at}{names.tower.embed_norm}", "embed.norm") if names.tower.embed_norm else ""
        rows += f"ignore {at}embeddings.position_ids : positions are counted\n"
        rows += _other_norms(tower, at, names.tower)
        for source, target in ((names.tower.ln_pre, "ln_pre"), (_ln_final(tower, names.tower), "ln_final")):
            rows += norm_rows(f"{at}{source}", target) if source else ""
        layers = parts.at(tower, names.tower.blocks)
        rows += blocks.rows(layers, f"{at}{names.tower.blocks}", names.tower.block)
        rows += norm_rows(names.ln_pool, "ln_pool") if spec.ln_pool is not None else ""
        if names.head and parts.at(upstream, names.head).is_a("Conv2d"):
            upstream.decoder[1].expect("PixelShuffle")  # pixels are compared before it (calling.pixels)
            rows += f"""
                {names.head}.weight        ->  head.weight  : o d 1 1 -> o d
                {names.head}.bias | zeros  ->  head.bias
            """
        elif names.head:
            rows += linear_rows(names.head, "head")
        rows += linear_rows(names.head_dist, "head_dist") if names.head_dist else ""
        for key, reason in names.tower.ignored.items():
            rows += f"ignore {at}{key} : {reason}\n"
        for key, reason in names.ignored.items():
            rows += f"ignore {key} : {reason}\n"
        tables = bias.tables(tower, at, names.tower)
        biases = {"bias": bias.function(tables, spec.layout)} if tables else {}
        rows += bias.rows(tables) if tables else ""
        down, across = spec.embed.patch
        made = {**functions, **turning, **biases, "one_frame": lists.one_frame}
        return WeightMap.parse(rows, made, p=down, q=across)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        names = MODELS[qualified_name(upstream.module)]
        tower, at = parts.at(upstream, names.at), _prefixed(names.at)
        stream = blocks.stream_axes(names.tower.block)
        embedded = f"{at}{names.tower.embed_norm or names.tower.stem or names.tower.proj}"
        how = "" if names.tower.embed_norm or names.tower.stem or names.tower.flat else ": b d r c -> b (r c) d"
        how = {"frames": ": (batch p) m 1 1 1 -> batch p m", "patches": ": (batch p) m 1 1 -> batch p m"}.get(
            names.tower.listed, how
        )
        rows = f"{embedded}  ->  hook_embed  {how}\n"
        layers, rope = parts.at(tower, names.tower.blocks), spec.rope is not None
        rows += blocks.hooks(layers, f"{at}{names.tower.blocks}", names.tower.block, rope=rope)
        if names.tower.ln_pre:
            ln_pre = f"{at}{names.tower.ln_pre}"
            how = ": 1 (batch p) m -> batch p m" if names.tower.packed else ""
            rows += f"""
                {ln_pre} : in  ->  hook_full_embed         {how}
                {ln_pre}       ->  ln_pre.hook_normalized  {how}
                {ln_pre}       ->  hook_ln_pre             {how}
            """
        else:
            rows += f"{at}{names.tower.blocks}.0 : in  ->  hook_full_embed  {stream}\n"
        if spec.embed.norm is not None:
            rows += f"{embedded}  ->  embed.norm.hook_normalized\n"
        last = _last(tower, at, names.tower)
        how = stream if names.tower.listed or last.startswith(f"{at}{names.tower.blocks}.") else ""
        if spec.ln_final is not None and last:
            rows += f"""
                {last}  ->  ln_final.hook_normalized  {how}
                {last}  ->  hook_ln_final             {how}
            """
        rows += _head_rows(upstream, names, spec, last, how)
        return HookMap.parse(rows, w=spec.blocks[0].attn.d_head)

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        names = MODELS[qualified_name(upstream)]
        if names.tower.listed:
            return lists.call(upstream, upstream.get_submodule(_prefixed(names.at) + names.tower.proj), *inputs)
        return names.call(upstream, *inputs)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return _opened(upstream, MODELS[qualified_name(upstream)])


@contextmanager
def _opened(upstream: nn.Module, names: ModelNames) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(parts.explicit_attention(upstream))
        if names.tower.packed:
            stack.enter_context(calling.images_apart(upstream.get_submodule(_prefixed(names.at) + names.tower.packed)))
        if names.tower.listed:
            stack.enter_context(lists.together())
        yield


def _last(tower: Reader, at: str, names: TowerNames) -> str:
    """Return the place of the main output, or of what the head reads; empty where all streams pass by at once."""
    if names.last:
        return f"{at.removesuffix('.')} {names.last}"
    if names.ln_each and not tower.has(names.ln_each):
        return ""
    return f"{at}{_ln_final(tower, names) or f'{names.blocks}.{len(parts.at(tower, names.blocks)) - 1}'}"


def _head_rows(upstream: Reader, names: ModelNames, spec: ModelSpec, last: str, how: str) -> str:
    """Return the hook rows of what comes behind the encoder; ``how``: that of what it returns."""
    grid, rows = "", ""
    if names.head and parts.at(upstream, names.head).is_a("Conv2d"):
        grid = "  : b d r c -> b (r c) d"
    if spec.ln_pool is not None and names.pool == "patches":  # upstream norms all tokens before it cuts
        rows += f"{names.head} : in  ->  ln_pool.hook_normalized\n"
    elif spec.ln_pool is not None:
        rows += f"""
            {names.ln_pool} : in  ->  hook_pooled
            {names.ln_pool}       ->  ln_pool.hook_normalized
        """
    elif names.head:
        rows += f"{names.head} : in  ->  hook_pooled{grid}\n"
    elif last:
        rows += f"{last}  ->  hook_pooled  {how}\n"
    if names.head_dist:
        rows += f"""
            {names.head_dist} : in  ->  hook_pooled_dist
             @ div              ->  hook_logits
        """
    elif names.head:
        rows += f"{names.head}  ->  hook_logits{grid}\n"
    elif last:
        rows += f"{last}  ->  hook_logits  {how}\n"
    return rows


def _ln_final(tower: Reader, names: TowerNames) -> str:
    if names.ln_each and tower.has(names.ln_each):
        return f"{names.ln_each}.{len(parts.at(tower, names.blocks)) - 1}"
    return names.ln_final


def _other_norms(tower: Reader, at: str, names: TowerNames) -> str:
    """Return the weight rows of norms behind other blocks than the last."""
    if not names.ln_each or not tower.has(names.ln_each):
        return ""
    used, count = _ln_final(tower, names), len(parts.at(tower, names.ln_each))
    others = [names.ln_final, *(f"{names.ln_each}.{index}" for index in range(count))]
    return "".join(f"ignore {at}{path}.{{*}} : of a stream that is not the last\n" for path in others if path != used)


def _prefixed(path: str) -> str:
    return f"{path}." if path else ""


def _image_size(tower: Reader, names: TowerNames) -> tuple[int, int]:
    if not names.image:
        side = math.isqrt(parts.at(tower, names.pos).num_embeddings)
        down, across = _patch(tower, names)
        return side * down, side * across
    size = parts.at(tower, names.image)
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2:
        raise tower.unsupported(f"an image of sides other than height and width (image_size={size!r})")
    if not names.listed:
        return sides[0], sides[1]
    down, across = _patch(tower, names)  # upstream is handed whole patches
    return sides[0] // down * down, sides[1] // across * across


def _layout(tower: Reader, names: TowerNames) -> TokenLayout:
    height, width = _image_size(tower, names)
    down, across = _patch(tower, names)
    tokens = {kind: parts.at(tower, path) for kind, path in names.prefix}
    counts = {kind: 1 if token.ndim == 1 else token.shape[1] for kind, token in tokens.items()}
    return TokenLayout(**counts, rows=height // down, columns=width // across)


def _patch(tower: Reader, names: TowerNames) -> tuple[int, int]:
    if not names.flat:
        return parts.at(tower, names.proj).kernel_size[-2:]
    side = parts.at(tower, names.patch)
    return side, side


def _width(tower: Reader, names: TowerNames) -> int:
    proj = parts.at(tower, names.proj)
    return parts.linear(proj).out_features if names.flat else proj.out_channels


def _embed(tower: Reader, names: TowerNames, layout: TokenLayout) -> EmbedSpec:
    proj, patch = parts.at(tower, names.proj), _patch(tower, names)
    if names.listed == "frames":
        plain_patches(proj, "Conv3d")
        above = parts.at(tower, names.proj.rpartition(".")[0])
        if above.get("temporal_patch_size", proj.kernel_size[0]) != proj.kernel_size[0]:
            raise above.unsupported(f"temporal_patch_size={above.temporal_patch_size!r}, unlike its projection's")
    elif not names.stem and not names.flat:
        plain_patches(proj)
    return EmbedSpec(
        patch=patch,
        in_channels=proj.in_features // (patch[0] * patch[1]) if names.flat else proj.in_channels,
        stem="opaque" if names.stem else "conv",
        by_token=bool(names.packed),
        norm=parts.norm(parts.at(tower, names.embed_norm)) if names.embed_norm else None,
        pos=positions.check(tower, names, layout),
        interpolation=positions.interpolation(tower, names, layout),
    )


def _classes(upstream: Reader, names: ModelNames) -> int | None:
    if not names.head:
        return None
    head = parts.at(upstream, names.head)
    if head.is_a("Conv2d") and names.pool == "patches":
        plain_patches(head)
        if tuple(head.kernel_size) != (1, 1):
            raise head.unsupported("a head that reads several patches at once")
        return head.out_channels
    return parts.READ.classes(head)


def _pool(names: ModelNames, *, averaged: bool) -> PoolSpec:
    if names.ln_pool and not averaged:
        return PoolSpec(kind="token")
    if names.pool == "avg_all":
        return PoolSpec(kind="avg", with_prefix=True)
    return PoolSpec(kind=names.pool)
