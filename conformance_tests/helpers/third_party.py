"""A small network as a third party writes it, with an adapter to the canonical form and one that hooks it as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prisma_core.plugin import (
    Adapter,
    HookMap,
    MapAdapter,
    MapSpec,
    ModelSpec,
    NormSpec,
    Reader,
    TokenLayout,
    WeightMap,
    qualified_name,
)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


def residual(x: Tensor, y: Tensor, minus: bool = False, *, twice: bool = False) -> Tensor:
    if minus:
        return x - y
    return x + 2 * y if twice else x + y


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = residual(x, self.drop(self.attn(self.norm1(x))))
        return residual(x, self.mixed(self.norm2(x)))

    def mixed(self, x: Tensor, bare: bool = False) -> Tensor:
        return self.fc2(self.fc1(x) if bare else self.act(self.fc1(x)))


class Sequel(Block):
    def forward(self, x: Tensor) -> Tensor:
        return residual(self.attn(self.norm1(x)), self.mixed(self.norm2(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 4, stride=4)
        self.layers = nn.ModuleList(Block(6) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Plain(Adapter):
    """An adapter as third parties write them: it recognises torch's classes, and none of the library's own."""

    types = (qualified_name(Net()),)

    def spec(self, upstream: Reader) -> ModelSpec:
        upstream.embed.expect("Conv2d")
        upstream.norm.expect("LayerNorm")
        for layer in upstream.layers:
            layer.norm1.expect("LayerNorm")
            layer.norm2.expect("LayerNorm")
            layer.act.expect("GELU")
        plain = ModelSpec.plain(
            d_model=6, layers=2, heads=1, image=8, d_mlp=7, pos=False, pool="avg", n_classes=5, norm=NormSpec(eps=1e-5)
        )
        return plain.model_copy(update={"layout": TokenLayout(rows=2, columns=2)})

    def weights(self, upstream: Reader, spec: Any) -> WeightMap:
        return WeightMap.parse("""
            embed.{*} -> embed.proj.{*}
            layers.{l}.norm1.{*} -> blocks.{l}.ln1.{*}
            layers.{l}.norm2.{*} -> blocks.{l}.ln2.{*}
            layers.{l}.attn.qkv.{*} -> blocks.{l}.attn.qkv.{*}
            layers.{l}.attn.proj.{*} -> blocks.{l}.attn.out.{*}
            layers.{l}.fc1.{*} -> blocks.{l}.mlp.fc_in.{*}
            layers.{l}.fc2.{*} -> blocks.{l}.mlp.fc_out.{*}
            norm.{*} -> ln_final.{*}
            head.{*} -> head.{*}
            ignore unused.{*} : makes no number
        """)

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return HookMap.parse("layers.{l} : in -> blocks.{l}.hook_resid_pre\nlayers.{l} -> blocks.{l}.hook_resid_post")


class Mapped(MapAdapter):
    types = Plain.types

    def spec(self, upstream: Reader) -> MapSpec:
        return MapSpec(shape=(3, 8, 8), n_classes=5)

    def hooks(self, upstream: Reader, spec: Any) -> HookMap:
        return HookMap.parse("layers.1 -> blocks.1.hook_resid_post : batch pos d_model")


def drawn() -> Net:
    """Return a network in float64 with every parameter drawn."""
    torch.manual_seed(0)
    net = Net().double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    return net


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
