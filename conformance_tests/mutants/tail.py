"""A third-party model with registers behind the patches: functions of its hook table turn them to the front."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from prisma_core import ModelSpec, TokenLayout
from prisma_core.plugin import Adapter, AnySpec, Case, EmbedSpec, HookMap, PoolSpec, Reader, WeightMap

from .north import HOOKS, WEIGHTS, Layer, NorthAdapter, RMSNorm, apart, rms_norm

REGISTERS = 2


class TailViT(nn.Module):
    def __init__(self, size: int = 12, patch: int = 4, width: int = 20, heads: int = 2, depth: int = 2):
        super().__init__()
        self.size, self.patch = size, patch
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros((size // patch) ** 2, width))
        self.registers = nn.Parameter(torch.zeros(REGISTERS, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.head = RMSNorm(width, 1e-6), nn.Linear(width, 7)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([x, self.registers.expand(len(x), -1, -1)], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, : -len(self.registers)].mean(1))


def turning(heads: int, by: int = REGISTERS) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions that put the last tokens in front: of a stream, of heads side by side or in front, of a pattern."""

    def by_head(x: Tensor) -> Tensor:
        return rearrange(x.roll(by, 1), "b p (h d) -> b p h d", h=heads)

    return {
        "stream": lambda x: x.roll(by, 1),
        "z": by_head,
        "heads": lambda x: x.transpose(1, 2).roll(by, 1),
        "pattern": lambda x: x.roll((by, by), (-2, -1)),
    }


def _turned(row: str) -> str:
    place, _, rest = row.partition("->")
    hook, _, how = rest.partition(" : ")
    name = "pattern" if "scores" in hook or "pattern" in hook else {"b h": "heads", "b p": "z"}.get(how[:3], "stream")
    unchanged = "hook_embed" in hook or "hook_pooled" in hook
    return row if unchanged else f"{place} -> {hook} : {{{name}}}"


TURNED = "\n".join(map(_turned, HOOKS.strip().splitlines()))


class TailAdapter(Adapter):
    """Right as it stands; ``functions`` of the hook table may be given to plant a mistake."""

    types = (f"{__name__}.TailViT",)

    def __init__(self, functions: dict[str, Callable[[Tensor], Tensor]] | None = None):
        self.functions = functions or {}

    def spec(self, upstream: Reader) -> ModelSpec:
        stem = upstream.patches.expect("Conv2d", padding=(0, 0), dilation=(1, 1), groups=1)
        stem.expect(padding_mode="zeros", stride=(upstream.patch,) * 2)
        rows, width = upstream.size // upstream.patch, stem.out_channels
        return ModelSpec(
            d_model=width,
            image_size=(upstream.size,) * 2,
            embed=EmbedSpec(patch=stem.stride, in_channels=stem.in_channels),
            layout=TokenLayout(registers=len(upstream.registers), rows=rows, columns=rows),
            blocks=tuple(NorthAdapter().block(layer, width) for layer in upstream.layers),
            ln_final=rms_norm(upstream.norm),
            pool=PoolSpec(kind="avg"),
            d_pool=width,
            n_classes=upstream.head.out_features,
        )

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        assert isinstance(spec, ModelSpec)
        blocks = WEIGHTS.replace("[cls, registers] ", "registers").replace(
            "positions                    ->  embed.pos_embed                                   : {positions}",
            "[zeros, positions]           ->  embed.pos_embed",
        )
        return WeightMap.parse(blocks, {"apart": apart(spec.blocks[0].attn.n_heads)})

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, ModelSpec)
        return HookMap.parse(TURNED, turning(spec.blocks[0].attn.n_heads) | self.functions)


CASE = Case("tail", TailViT)
