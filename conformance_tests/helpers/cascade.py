"""A hierarchical model of its own kind, and a hook map for it as an outside author writes one.

Convolutions with layer scale and channels first, then attention with a class token over fewer keys than queries through
the fused kernel alone, then a pooling with learned queries and no heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prisma_core.plugin import Case, HookMap, MapAdapter, MapSpec, Reader


class Output(NamedTuple):
    logits: Tensor
    stages: list[Tensor]


class ConvBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.BatchNorm2d(width, eps=1e-3)
        self.fc1, self.fc2 = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(3 * width, width, 1)
        self.gamma = nn.Parameter(torch.ones(width))
        self.drop_path = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.hardswish(self.fc1(self.norm(self.depthwise(x)))))
        return x + self.drop_path(self.gamma[:, None, None] * y)


class ReducedAttention(nn.Module):
    def __init__(self, width: int, heads: int, reduce: int):
        super().__init__()
        self.heads, self.reduce = heads, reduce
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, side: int) -> Tensor:
        grid = x[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        few = torch.cat([x[:, :1], F.avg_pool2d(grid, self.reduce).flatten(2).transpose(1, 2)], 1)
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(few).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int, reduce: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.ls1, self.ls2 = ReducedAttention(width, heads, reduce), LayerScale(width), LayerScale(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor, side: int) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), side))
        return x + self.ls2(self.mlp(self.norm2(x)))


class LearnedPool(nn.Module):
    def __init__(self, width: int, queries: int):
        super().__init__()
        self.queries, self.scale = nn.Parameter(torch.randn(queries, width)), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return ((self.queries @ x.transpose(1, 2) * self.scale).softmax(-1) @ x).mean(1)


class Cascade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.size, self.side = 24, 6
        self.stem = nn.Sequential(nn.Conv2d(3, 10, 3, stride=2, padding=1), nn.BatchNorm2d(10))
        self.conv_stage = nn.Sequential(ConvBlock(10), ConvBlock(10))
        self.down = nn.Conv2d(10, 12, 2, stride=2)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(1, 12, 6, 6))
        self.attn_stage = nn.ModuleList(AttentionBlock(12, heads=4, reduce=3) for _ in range(2))
        self.norm, self.pool, self.head = nn.LayerNorm(12), LearnedPool(12, 7), nn.Linear(24, 11)

    def forward(self, image: Tensor) -> Output:
        x = first = self.conv_stage(self.stem(image))
        x = (self.down(x) + self.pos).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for block in self.attn_stage:
            x = block(x, self.side)
        x = self.norm(x)
        return Output(self.head(torch.cat([x[:, 0], self.pool(x[:, 1:])], -1)), [first, x])


GRID = "batch d_model row column -> batch row column d_model"
INNER = "batch d_mlp row column -> batch row column d_mlp"
KEYS = "batch head key_pos d_head -> batch key_pos head d_head"
SQUARE, HEADS = "batch head query_pos key_pos", "batch pos (head d) -> batch pos head d"
CONV, ATTN, AT = "conv_stage.{l}", "attn_stage.{l}", "stages.1.blocks.{l}"
FUSED = f"{ATTN}.attn @ scaled_dot_product_attention"
ROWS = f"""
    stem                ->  hook_embed                              : {GRID}  = stem(input)
    {CONV} : in         ->  stages.0.blocks.{{l}}.hook_resid_pre      : {GRID}
    {CONV}.depthwise    ->  stages.0.blocks.{{l}}.hook_conv           : {GRID}  = {CONV}.depthwise(resid_pre)
    {CONV}.norm         ->  stages.0.blocks.{{l}}.ln.hook_normalized  : {GRID}  = {CONV}.norm(conv)
    {CONV}.fc1          ->  stages.0.blocks.{{l}}.mlp.hook_pre        : {INNER} = {CONV}.fc1(ln.normalized)
    {CONV} @ hardswish  ->  stages.0.blocks.{{l}}.mlp.hook_post       : {INNER} = hardswish(pre)
    {CONV}.drop_path    ->  stages.0.blocks.{{l}}.hook_mlp_out        : {GRID}  = {CONV}.gamma * {CONV}.fc2(mlp.post)
    {CONV}              ->  stages.0.blocks.{{l}}.hook_resid_post     : {GRID}
    down                ->  stages.1.hook_downsample                : {GRID}  = down(stages.0.blocks.1.resid_post)
    @ add               ->  stages.1.hook_placed                   : {GRID}  = downsample + pos
    @ cat               ->  hook_full_embed            : batch pos d_model
    {ATTN} : in         ->  {AT}.hook_resid_pre        : batch pos d_model
    {ATTN}.norm1        ->  {AT}.ln1.hook_normalized   : batch pos d_model  = {ATTN}.norm1(resid_pre)
    {ATTN}.attn.q       ->  {AT}.attn.hook_q           : {HEADS}  = {ATTN}.attn.q(ln1.normalized)
    {ATTN}.attn.kv : in ->  {AT}.attn.hook_reduced     : batch key_pos d_model
    {FUSED} : in1       ->  {AT}.attn.hook_k           : {KEYS}
    {FUSED} : in2       ->  {AT}.attn.hook_v           : {KEYS}
    {FUSED} : scores    ->  {AT}.attn.hook_attn_scores : {SQUARE}  = q . k * {{scale}}
    {FUSED} : pattern   ->  {AT}.attn.hook_pattern     : {SQUARE}
    {ATTN}.attn.proj : in -> {AT}.attn.hook_z          : {HEADS}
    {ATTN}.ls1          ->  {AT}.hook_attn_out         : batch pos d_model  = {ATTN}.ls1({ATTN}.attn.proj(attn.z))
    {ATTN} @ add        ->  {AT}.hook_resid_mid        : batch pos d_model
    {ATTN}.norm2        ->  {AT}.ln2.hook_normalized   : batch pos d_model  = {ATTN}.norm2(resid_mid)
    {ATTN}.mlp.0        ->  {AT}.mlp.hook_pre          : batch pos d_mlp    = {ATTN}.mlp.0(ln2.normalized)
    {ATTN}.mlp.1        ->  {AT}.mlp.hook_post         : batch pos d_mlp    = gelu(pre)
    {ATTN}.ls2          ->  {AT}.hook_mlp_out          : batch pos d_model  = {ATTN}.ls2({ATTN}.mlp.2(mlp.post))
    {ATTN}              ->  {AT}.hook_resid_post       : batch pos d_model
    norm                ->  hook_ln_final              : batch pos d_model  = norm(stages.1.blocks.1.resid_post)
    pool : in           ->  pool.hook_v                : batch pos d_model
    pool @ softmax : in ->  pool.hook_attn_scores      : batch query_pos key_pos  = pool.queries . v * pool.scale
    pool @ softmax      ->  pool.hook_pattern          : batch query_pos key_pos
    pool @ matmul#1     ->  pool.hook_z                : batch query_pos d_model
    pool                ->  pool.hook_attn_out         : batch d_model            = mean(z)
    head : in           ->  hook_pooled                : batch d_pool
    head                ->  hook_logits                : batch class              = head(pooled)
"""


class CascadeAdapter(MapAdapter):
    types = (f"{__name__}.Cascade",)

    def __init__(self, rows: str = ROWS):
        self.rows = rows

    def spec(self, upstream: Reader) -> MapSpec:
        return MapSpec(shape=(3, upstream.size, upstream.size), n_classes=upstream.head.out_features)

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        attn = upstream.attn_stage[0].attn
        scale = (attn.q.out_features // attn.heads) ** -0.5
        return HookMap.parse(self.rows.replace("{scale}", str(scale)), head=attn.heads)

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        full = acts["hook_full_embed"]
        yield "stages.1.blocks.0.hook_resid_pre = full_embed", acts["stages.1.blocks.0.hook_resid_pre"], full
        yield "hook_full_embed = placed, row by row", full[:, 1:], acts["stages.1.hook_placed"].flatten(1, 2)
        pooled = torch.cat([acts["hook_ln_final"][:, 0], acts["pool.hook_attn_out"]], -1)
        yield "hook_pooled = first(ln_final), pool.attn_out", acts["hook_pooled"], pooled
        yield "pool.hook_v = the patches of ln_final", acts["pool.hook_v"], acts["hook_ln_final"][:, 1:]
        for layer, block in enumerate(upstream.attn_stage):
            at = f"stages.1.blocks.{layer}.attn"
            both = torch.cat([acts[f"{at}.hook_k"].flatten(2), acts[f"{at}.hook_v"].flatten(2)], -1)
            yield f"{at}: k, v = kv(reduced)", both, block.attn.kv.module(acts[f"{at}.hook_reduced"])


CASE = Case("cascade", Cascade)
