"""Another third-party plugin: rotary positions beside learned ones, separate projections, pixels normed in the model.

Layer norms, the exact GELU, layer scale in modules, a class token and registers, a stem that is a linear layer on the
pixels of a patch, positions of the patches alone, the mean of the patches behind the last norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
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
    RopeSpec,
    WeightMap,
)

PREFIX, BASE = 3, 50.0


def angles(rows: int, columns: int, d_head: int, base: float) -> Tensor:
    """Angles of axial rotary positions ``[patch pair]``: half of the pairs turn by rows, half by columns."""
    speeds = base ** -torch.linspace(0, 1, d_head // 4, dtype=torch.float64)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([row.flatten()[:, None] * speeds, column.flatten()[:, None] * speeds], -1)


class Rotation(nn.Module):
    """Turns neighbouring channels of queries or keys ``[batch head pos d_head]``, but not those of the prefix."""

    def __init__(self, rows: int, columns: int, d_head: int):
        super().__init__()
        self.base = BASE
        self.register_buffer("angles", angles(rows, columns, d_head, BASE).float())

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x[:, :, PREFIX:, ::2], x[:, :, PREFIX:, 1::2]
        cos, sin = self.angles.cos(), self.angles.sin()
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
        return torch.cat([x[:, :, :PREFIX], turned], 2)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        pattern = (rotation(q) @ rotation(k).transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.o((pattern @ v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention, self.scale1, self.scale2 = SelfAttention(width, heads), LayerScale(width), LayerScale(width)
        self.up, self.act, self.down = nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.scale1(self.attention(self.before_attention(x), rotation))
        return x + self.scale2(self.down(self.act(self.up(self.before_mlp(x)))))


class SouthViT(nn.Module):
    def __init__(self, rows: int = 3, columns: int = 2, patch: int = 4, width: int = 24, heads: int = 3):
        super().__init__()
        self.rows, self.columns, self.patch = rows, columns, patch
        self.mean, self.std = nn.Buffer(torch.zeros(3)), nn.Buffer(torch.ones(3))
        self.stem = nn.Linear(3 * patch * patch, width)
        self.token, self.registers = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 2, width))
        self.positions = nn.Parameter(torch.zeros(1, rows * columns, width))
        self.rotation = Rotation(rows, columns, width // heads)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 7)

    def forward(self, image: Tensor) -> Tensor:
        image = (image - self.mean[:, None, None]) / self.std[:, None, None]
        pixels = rearrange(image, "b c (r p) (s q) -> b (r s) (p q c)", p=self.patch, q=self.patch)
        x = self.stem(pixels) + self.positions
        x = torch.cat([torch.cat([self.token, self.registers], 1).expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x, self.rotation)
        return self.head(self.norm(x)[:, PREFIX:].mean(1))


AT = "layers.{l}"
WEIGHTS = f"""
    [stem.weight, std]                ->  embed.proj.weight          : {{kernel}}
    [stem.weight, stem.bias, mean, std] -> embed.proj.bias           : {{offset}}
    [token, registers]                ->  embed.prefix               : 1 n d -> n d
    [zeros, positions : 1 n d -> n d] ->  embed.pos_embed
    rotation.angles                   ->  rope_cos                   : {{cos}}
    rotation.angles                   ->  rope_sin                   : {{sin}}
    {AT}.before_attention.{{*}}         ->  blocks.{{l}}.ln1.{{*}}
    [{AT}.attention.q.{{*}}, {AT}.attention.k.{{*}}, {AT}.attention.v.{{*}}] -> blocks.{{l}}.attn.qkv.{{*}}
    {AT}.attention.o.{{*}}              ->  blocks.{{l}}.attn.out.{{*}}
    {AT}.scale1.gamma                 ->  blocks.{{l}}.ls1.gamma
    {AT}.before_mlp.{{*}}               ->  blocks.{{l}}.ln2.{{*}}
    {AT}.up.{{*}}                       ->  blocks.{{l}}.mlp.fc_in.{{*}}
    {AT}.down.{{*}}                     ->  blocks.{{l}}.mlp.fc_out.{{*}}
    {AT}.scale2.gamma                 ->  blocks.{{l}}.ls2.gamma
    norm.{{*}}                          ->  ln_final.{{*}}
    head.{{*}}                          ->  head.{{*}}
"""
HOOKS = f"""
    stem                            ->  hook_embed
    {AT} : in                       ->  blocks.{{l}}.hook_resid_pre
    {AT}.before_attention           ->  blocks.{{l}}.ln1.hook_normalized
    {AT}.attention.q                ->  blocks.{{l}}.attn.hook_q            : b p (h d) -> b p h d
    {AT}.attention.k                ->  blocks.{{l}}.attn.hook_k            : b p (h d) -> b p h d
    {AT}.attention.v                ->  blocks.{{l}}.attn.hook_v            : b p (h d) -> b p h d
    {AT}.attention @ matmul : in    ->  blocks.{{l}}.attn.hook_rot_q        : b h p d -> b p h d
    {AT}.attention @ softmax : in   ->  blocks.{{l}}.attn.hook_attn_scores
    {AT}.attention @ softmax        ->  blocks.{{l}}.attn.hook_pattern
    {AT}.attention.o : in           ->  blocks.{{l}}.attn.hook_z            : b p (h d) -> b p h d
    {AT}.scale1                     ->  blocks.{{l}}.hook_attn_out
    {AT}.before_mlp : in            ->  blocks.{{l}}.hook_resid_mid
    {AT}.before_mlp                 ->  blocks.{{l}}.ln2.hook_normalized
    {AT}.up                         ->  blocks.{{l}}.mlp.hook_pre
    {AT}.act                        ->  blocks.{{l}}.mlp.hook_post
    {AT}.scale2                     ->  blocks.{{l}}.hook_mlp_out
    {AT}                            ->  blocks.{{l}}.hook_resid_post
    norm                            ->  hook_ln_final
    head : in                       ->  hook_pooled
"""


def kernel(weight: Tensor, std: Tensor) -> Tensor:
    return rearrange(weight, "d (p q c) -> d c p q", p=4, c=3) / std[:, None, None]


def offset(weight: Tensor, bias: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return bias - torch.einsum("dcpq,c->d", kernel(weight, std), mean)


def table(turn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Cosines or sines of angles, for both channels of a pair, and of none for the prefix."""
    return lambda x: turn(torch.cat([x.new_zeros(PREFIX, x.shape[1]), x])).repeat_interleave(2, -1)[:, None]


FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "kernel": kernel,
    "offset": offset,
    "cos": table(torch.cos),
    "sin": table(torch.sin),
}


class SouthAdapter(Adapter):
    """Right as it stands; tests plant mistakes, as in ``NorthAdapter``."""

    types = (f"{__name__}.SouthViT",)
    ignored: ClassVar[Mapping[str, str]] = {"Rotation.base": "the angles are made from it"}

    def __init__(
        self,
        weights: str = WEIGHTS,
        hooks: str = HOOKS,
        fact: Mapping[str, Callable[[Reader], Any]] | None = None,
        functions: Mapping[str, Callable[..., Tensor]] | None = None,
    ):
        self.tables = weights, hooks
        self.functions = {**FUNCTIONS, **(functions or {})}
        right: dict[str, Callable[[Reader], Any]] = {
            "layout": lambda upstream: TokenLayout(cls=1, registers=2, rows=upstream.rows, columns=upstream.columns),
            "rope": lambda upstream: RopeSpec(layout="interleaved"),
            "pool": lambda upstream: PoolSpec(kind="avg"),
            "ln_final": lambda upstream: norm(upstream.norm),
            "ln1": lambda layer: norm(layer.before_attention),
            "ln2": lambda layer: norm(layer.before_mlp),
            "act": lambda layer: "gelu",
            "heads": lambda layer: layer.attention.heads,
            "kv_heads": lambda layer: fact["heads"](layer),
            "scale": lambda layer: layer.attention.scale,
            "attn_scale": lambda layer: True,
            "mlp_scale": lambda layer: True,
            "kind": lambda layer: "pre",
        }
        fact = self.fact = right | dict(fact or {})

    def spec(self, upstream: Reader) -> ModelSpec:
        fact, patch = self.fact, upstream.patch
        upstream.rotation.expect(f"{__name__}.Rotation")
        return ModelSpec(
            d_model=upstream.stem.out_features,
            image_size=(upstream.rows * patch, upstream.columns * patch),
            embed=EmbedSpec(patch=(patch, patch)),
            layout=fact["layout"](upstream),
            rope=fact["rope"](upstream),
            blocks=tuple(self.block(layer) for layer in upstream.layers),
            ln_final=fact["ln_final"](upstream),
            pool=fact["pool"](upstream),
            d_pool=upstream.stem.out_features,
            n_classes=upstream.head.out_features,
        )

    def block(self, layer: Reader) -> BlockSpec:
        layer.act.expect("GELU", approximate="none")
        fact, width = self.fact, layer.attention.q.out_features
        heads = fact["heads"](layer)
        scale = fact["scale"](layer)
        attn = AttentionSpec(n_heads=heads, n_kv_heads=fact["kv_heads"](layer), d_head=width // heads, scale=scale)
        return BlockSpec(
            kind=fact["kind"](layer),
            attn=attn,
            mlp=MlpSpec(d_mlp=layer.up.out_features, act=fact["act"](layer)),
            ln1=fact["ln1"](layer),
            ln2=fact["ln2"](layer),
            attn_scale=fact["attn_scale"](layer),
            mlp_scale=fact["mlp_scale"](layer),
        )

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        return WeightMap.parse(self.tables[0], self.functions)

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        return HookMap.parse(self.tables[1], h=upstream.layers[0].attention.heads)


def norm(reader: Reader) -> NormSpec:
    return NormSpec(eps=reader.expect("LayerNorm").eps)


CASE = Case("south", SouthViT)
