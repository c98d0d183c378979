"""A third-party plugin: a model with parts that no library of Prisma's plugins has side by side, and its adapter.

RMS norms, queries, keys and values fused head by head and normed, a scale of scores of its own, a gated MLP in one
matrix, layer scale, registers, positions as a grid, class token and mean side by side, an output in a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prisma_core import ModelSpec, TokenLayout
from prisma_core.plugin import (
    Adapter,
    AnySpec,
    AttentionSpec,
    BlockSpec,
    Case,
    EmbedSpec,
    HookMap,
    MlpSpec,
    NormSpec,
    PoolSpec,
    Reader,
    WeightMap,
)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.logit_scale = heads, 0.3
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width // heads, 1e-5), RMSNorm(width // heads, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.heads, 3, -1)).transpose(1, 2).unbind(3)
        q, k = self.q_norm(q), self.k_norm(k)
        pattern = (q @ k.transpose(-2, -1) * self.logit_scale).softmax(dim=-1)
        return self.out((pattern @ v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn, self.gamma1 = RMSNorm(width, 1e-6), SelfAttention(width, heads), _ones(width)
        self.norm2, self.ffn, self.gamma2 = RMSNorm(width, 1e-6), SwiGLU(width, 2 * width + 2), _ones(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.gamma1
        return x + self.ffn(self.norm2(x)) * self.gamma2


class NorthViT(nn.Module):
    def __init__(self, size: int = 12, patch: int = 4, width: int = 20, heads: int = 2, depth: int = 2):
        super().__init__()
        self.size, self.patch = size, patch
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, width))
        self.registers = nn.Parameter(torch.zeros(2, width))
        self.positions = nn.Parameter(torch.zeros(size // patch, size // patch, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.head = RMSNorm(width, 1e-6), nn.Linear(2 * width, 7)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions.flatten(0, 1)
        x = torch.cat([torch.cat([self.cls, self.registers]).expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return {"logits": self.head(torch.cat([x[:, 0], x[:, 3:].mean(1)], dim=-1))}


def _ones(width: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(width))


WEIGHTS = """
    patches.{*}                  ->  embed.proj.{*}
    [cls, registers]             ->  embed.prefix
    positions                    ->  embed.pos_embed                                   : {positions}
    layers.{l}.norm1.weight      ->  blocks.{l}.ln1.weight
    layers.{l}.attn.qkv.{*}      ->  blocks.{l}.attn.qkv.{*}                           : {apart}
    layers.{l}.attn.q_norm.{*}   ->  blocks.{l}.attn.q_norm.{*}
    layers.{l}.attn.k_norm.{*}   ->  blocks.{l}.attn.k_norm.{*}
    layers.{l}.attn.out.{*}      ->  blocks.{l}.attn.out.{*}
    layers.{l}.gamma1            ->  blocks.{l}.ls1.gamma
    layers.{l}.norm2.weight      ->  blocks.{l}.ln2.weight
    layers.{l}.ffn.w12.{*}       ->  [blocks.{l}.mlp.fc_gate.{*}, blocks.{l}.mlp.fc_in.{*}]
    layers.{l}.ffn.w3.{*}        ->  blocks.{l}.mlp.fc_out.{*}
    layers.{l}.gamma2            ->  blocks.{l}.ls2.gamma
    norm.weight                  ->  ln_final.weight
    head.{*}                     ->  head.{*}
"""

HOOKS = """
    patches                           ->  hook_embed                         : b d r c -> b (r c) d
    layers.{l} : in                   ->  blocks.{l}.hook_resid_pre
    layers.{l}.norm1                  ->  blocks.{l}.ln1.hook_normalized
    layers.{l}.attn.q_norm            ->  blocks.{l}.attn.hook_q             : b h p d -> b p h d
    layers.{l}.attn.k_norm            ->  blocks.{l}.attn.hook_k             : b h p d -> b p h d
    layers.{l}.attn @ matmul#1 : in1  ->  blocks.{l}.attn.hook_v             : b h p d -> b p h d
    layers.{l}.attn @ softmax : in    ->  blocks.{l}.attn.hook_attn_scores
    layers.{l}.attn @ softmax         ->  blocks.{l}.attn.hook_pattern
    layers.{l}.attn.out : in          ->  blocks.{l}.attn.hook_z             : b p (h d) -> b p h d
    layers.{l} @ mul                  ->  blocks.{l}.hook_attn_out
    layers.{l}.norm2 : in             ->  blocks.{l}.hook_resid_mid
    layers.{l}.norm2                  ->  blocks.{l}.ln2.hook_normalized
    layers.{l}.ffn @ silu : in        ->  blocks.{l}.mlp.hook_pre
    layers.{l}.ffn.w3 : in            ->  blocks.{l}.mlp.hook_post
    layers.{l} @ mul#1                ->  blocks.{l}.hook_mlp_out
    layers.{l}                        ->  blocks.{l}.hook_resid_post
    norm                              ->  hook_ln_final
    head : in                         ->  hook_pooled
"""


def apart(heads: int) -> Callable[[Tensor], Tensor]:
    """Queries, keys and values apart, which upstream holds side by side for each head."""

    def function(x: Tensor) -> Tensor:
        return rearrange(x, "(h three d) ... -> (three h d) ...", three=3, h=heads)

    return function


def grid_positions(grid: Tensor) -> Tensor:
    return torch.cat([grid.new_zeros(3, grid.shape[-1]), grid.flatten(0, 1)])


class NorthAdapter(Adapter):
    """Right as it stands; tests plant mistakes in its tables and its facts.

    Args:
        weights, hooks: the tables.
        fact: changes a fact while it is read: ``{"scale": lambda attn: 0.5}``.
        functions: of the weight table, instead of the right ones.
    """

    types = (f"{__name__}.NorthViT",)
    ignored: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        weights: str = WEIGHTS,
        hooks: str = HOOKS,
        fact: Mapping[str, Callable[[Reader], Any]] | None = None,
        functions: Mapping[str, Callable[..., Tensor]] | None = None,
    ):
        self.tables = weights, hooks
        self.functions = functions or {}
        right: dict[str, Callable[[Reader], Any]] = {
            "scale": lambda attn: attn.logit_scale,
            "act": lambda ffn: "silu",
            "ln1": lambda layer: rms_norm(layer.norm1),
            "ln2": lambda layer: rms_norm(layer.norm2),
            "qk_norm": lambda attn: shared_eps(attn),
            "ln_final": lambda upstream: rms_norm(upstream.norm),
            "attn_scale": lambda layer: True,
            "mlp_scale": lambda layer: True,
            "pool": lambda upstream: PoolSpec(kind="token_and_avg"),
            "kind": lambda layer: "pre",
        }
        self.fact = right | dict(fact or {})

    def spec(self, upstream: Reader) -> ModelSpec:
        stem, side = upstream.patches.expect("Conv2d", padding=(0, 0), dilation=(1, 1), groups=1), upstream.size
        stem.expect(padding_mode="zeros", stride=(upstream.patch,) * 2)
        width = stem.out_channels
        return ModelSpec(
            d_model=width,
            image_size=(side, side),
            embed=EmbedSpec(patch=stem.stride, in_channels=stem.in_channels),
            layout=TokenLayout(
                cls=1, registers=len(upstream.registers), rows=side // upstream.patch, columns=side // upstream.patch
            ),
            blocks=tuple(self.block(layer, width) for layer in upstream.layers),
            ln_final=self.fact["ln_final"](upstream),
            pool=self.fact["pool"](upstream),
            d_pool=2 * width,
            n_classes=upstream.head.out_features,
        )

    def block(self, layer: Reader, width: int) -> BlockSpec:
        attn, heads, fact = layer.attn, layer.attn.heads, self.fact
        return BlockSpec(
            kind=fact["kind"](layer),
            attn=AttentionSpec(
                n_heads=heads,
                n_kv_heads=heads,
                d_head=width // heads,
                scale=fact["scale"](attn),
                qk_norm=fact["qk_norm"](attn),
            ),
            mlp=MlpSpec(d_mlp=layer.ffn.w3.in_features, act=fact["act"](layer.ffn), gated=True),
            ln1=fact["ln1"](layer),
            ln2=fact["ln2"](layer),
            attn_scale=fact["attn_scale"](layer),
            mlp_scale=fact["mlp_scale"](layer),
        )

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        assert isinstance(spec, ModelSpec)
        right = {"apart": apart(spec.blocks[0].attn.n_heads), "positions": grid_positions}
        return WeightMap.parse(self.tables[0], right | dict(self.functions))

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, ModelSpec)
        return HookMap.parse(self.tables[1], h=spec.blocks[0].attn.n_heads)


def rms_norm(norm: Reader) -> NormSpec:
    return NormSpec(kind="rms", eps=norm.expect(f"{__name__}.RMSNorm").eps)


def shared_eps(attn: Reader) -> NormSpec:
    attn.k_norm.expect(eps=attn.q_norm.eps)
    return rms_norm(attn.q_norm)


CASE = Case("north", NorthViT)
