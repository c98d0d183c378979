"""A small upstream with attention in windows, as libraries write it, and its hook map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prisma_core.contract.adapter import MapAdapter
from prisma_core.maps.places import FUSED, HookMap
from prisma_core.maps.reader import Reader
from prisma_core.spec import MapSpec
from prisma_core.upstream.model import HookedUpstream

HEADS, WIDTH, WINDOW = 2, 8, 3


class Windows(nn.Module):
    """Attention in windows, as libraries write it: folded axes, edits in place, several results."""

    def __init__(self, fused: bool):
        super().__init__()
        self.fused = fused
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.distance = nn.Parameter(torch.zeros(HEADS, WINDOW, WINDOW))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, n, _ = x.shape
        qkv = self.qkv(x)
        qkv += self.bias  # in place: what qkv gave out is no longer what it was
        q, k, v = qkv.view(batch * n // WINDOW, WINDOW, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=self.distance)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + self.distance
            z = scores.softmax(-1) @ v
        z = self.out(z.transpose(1, 2).reshape(batch, n, -1))
        return z, z.mean()


class Block(nn.Module):
    def __init__(self, fused: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Windows(fused)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(inplace=True), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))[0]
        return x + self.mlp(self.norm2(x))


class Upstream(nn.Module):
    def __init__(self, fused: bool = True):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList([Block(fused), Block(not fused)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1)), 0


GRID = "batch pos d_model"
HEAD = "(batch window) head pos d_head -> batch window pos head d_head"
SQUARE = "(batch window) head query_pos key_pos -> batch window head query_pos key_pos"


def block_rows(n: int, fused: bool) -> str:
    at = f"blocks.{n}"
    inside = f"""
        {at}.attn @ softmax : in  ->  {at}.attn.hook_attn_scores  : {SQUARE}
        {at}.attn @ softmax       ->  {at}.attn.hook_pattern      : {SQUARE}  = softmax(attn_scores)
        {at}.attn @ matmul#1      ->  {at}.attn.hook_z            : {HEAD}
    """
    opened = f"""
        {at}.attn @ {FUSED} : scores   ->  {at}.attn.hook_attn_scores  : {SQUARE}
        {at}.attn @ {FUSED} : pattern  ->  {at}.attn.hook_pattern      : {SQUARE}  = softmax(attn_scores)
        {at}.attn @ {FUSED}            ->  {at}.attn.hook_z            : {HEAD}
    """
    return f"""
        {at} : in                 ->  {at}.hook_resid_pre        : {GRID}
        {at}.norm1                ->  {at}.ln1.hook_normalized   : {GRID}  = {at}.norm1(resid_pre)
        {at}.attn.qkv             ->  {at}.attn.hook_projected   : batch pos d_qkv  = {at}.attn.qkv(ln1.normalized)
        {at}.attn @ unbind        ->  {at}.attn.hook_q           : {HEAD}
        {at}.attn @ unbind : out1 ->  {at}.attn.hook_k           : {HEAD}
        {at}.attn @ unbind : out2 ->  {at}.attn.hook_v           : {HEAD}
        {opened if fused else inside}
        {at}.attn                 ->  {at}.hook_attn_out         : {GRID}
        {at} @ add                ->  {at}.hook_resid_mid        : {GRID}  = resid_pre + attn_out
        {at}.mlp.0                ->  {at}.mlp.hook_pre          : batch pos d_mlp  = {at}.mlp.0({at}.norm2(resid_mid))
        {at}.mlp.1                ->  {at}.mlp.hook_post         : batch pos d_mlp  = relu(pre)
        {at}.mlp                  ->  {at}.hook_mlp_out          : {GRID}  = {at}.mlp.2(mlp.post)
        {at}                      ->  {at}.hook_resid_post       : {GRID}
    """


class Adapter(MapAdapter):
    types = (f"{__name__}.Upstream",)

    def spec(self, upstream: Reader) -> MapSpec:
        return MapSpec(shape=(6, 4), sizes=((9, 4),), n_classes=upstream.head.out_features)

    def rows(self, upstream: Reader) -> str:
        rows = f"embed -> hook_embed : {GRID} = embed(input)\n"
        for n, block in enumerate(upstream.blocks):
            rows += block_rows(n, block.attn.fused)
        pooled = f"head : in -> hook_pooled : batch d_model = mean(blocks.{n}.resid_post)\n"
        return rows + pooled + "head -> hook_logits : batch class = head(pooled)"

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        return HookMap.parse(self.rows(upstream))

    def reference_places(self, upstream: Reader) -> HookMap:
        rows = [block_rows(n, False) for n, block in enumerate(upstream.blocks) if block.attn.fused]
        kept = [line for line in "\n".join(rows).splitlines() if "softmax" in line]
        return HookMap.parse("\n".join(kept))

    def unfused_attention(self, upstream: Any) -> Any:
        return StepByStep(upstream)

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        for n, block in enumerate(upstream.blocks):
            q, k = acts[f"blocks.{n}.attn.hook_q"], acts[f"blocks.{n}.attn.hook_k"]
            scores = torch.einsum("bwqhd,bwkhd->bwhqk", q, k) * q.shape[-1] ** -0.5 + block.attn.distance
            yield f"blocks.{n}: scores = q . k * scale + distance", acts[f"blocks.{n}.attn.hook_attn_scores"], scores


class StepByStep:
    def __init__(self, upstream: nn.Module):
        self.attns = [module for module in upstream.modules() if isinstance(module, Windows) and module.fused]

    def __enter__(self) -> None:
        for attn in self.attns:
            attn.fused = False

    def __exit__(self, *exc: object) -> None:
        for attn in self.attns:
            attn.fused = True


def stages(heads: int) -> HookedUpstream:
    """Return two stages whose hook_z has windows before positions: two heads in the first, in the second as said."""
    torch.manual_seed(0)
    rows = "".join(
        f"{n} -> stages.{n}.blocks.0.attn.hook_z : batch (window pos) (head d_head) -> batch window pos head d_head\n"
        for n in range(2)
    )
    upstream = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 4 * heads), nn.Tanh())
    table = HookMap.parse(rows + "2 -> hook_logits : batch pos class", window=3, d_head=4)
    return HookedUpstream(upstream, table, MapSpec(shape=(6, 5)), lambda result: result)
