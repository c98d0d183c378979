"""DINO, DINOv2 and DINOv3 in the layout of Meta's own files: a module with their keys, to load them into.

Sources: "Emerging properties in self-supervised vision transformers" (Caron et al. 2021), "DINOv2" (Oquab et al. 2023),
"Vision transformers need registers" (Darcet et al. 2023), "DINOv3" (Siméoni et al. 2025), and the repositories
facebookresearch/dino, dinov2 and dinov3, whose names this module keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """The facts in which these models differ.

    Attributes:
        grid: rows and columns of patches of an image of the native size.
        registers_name: ``register_tokens`` or ``storage_tokens``.
        mlp: ``plain``; gated with one projection for both inputs (``packed``), or with two (``split``).
        masked_bias: the bias of queries, keys and values is multiplied with a mask.
        periods: of rotary positions, as many as there are; 0: positions are learned.
        antialias, offset, in_float32: how learned positions are resized.
    """

    width: int
    depth: int
    heads: int
    patch: tuple[int, int]
    grid: tuple[int, int]
    d_mlp: int
    in_channels: int = 3
    registers: int = 0
    registers_name: Literal["register_tokens", "storage_tokens"] = "register_tokens"
    mlp: Literal["plain", "packed", "split"] = "plain"
    layer_scale: bool = False
    mask_token: bool = False
    local_norm: bool = False
    qkv_bias: bool = True
    masked_bias: bool = False
    proj_bias: bool = True
    ffn_bias: bool = True
    periods: int = 0
    eps: float = 1e-6
    antialias: bool = False
    offset: float = 0.1
    in_float32: bool = False


class MetaViT(nn.Module):
    """A vision transformer of Meta's DINO family; it returns the normed class token."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.patch_embed = PatchEmbed(arch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        if arch.periods:
            self.rope_embed = RopePositions(arch)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(arch.grid), arch.width))
        if arch.registers:
            setattr(self, arch.registers_name, nn.Parameter(torch.zeros(1, arch.registers, arch.width)))
        if arch.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, arch.width))
        self.blocks = nn.ModuleList(Block(arch) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.width, eps=arch.eps)
        if arch.local_norm:
            self.local_cls_norm = nn.LayerNorm(arch.width, eps=arch.eps)
        self.head = nn.Identity()
        self.grid = arch.grid
        self.interpolate_antialias = arch.antialias
        self.interpolate_offset = arch.offset
        self.interpolate_in_float32 = arch.in_float32

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch_embed(image)
        grid = (patches.shape[1], patches.shape[2])
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), patches.flatten(1, 2)], dim=1)
        rope = None
        if hasattr(self, "rope_embed"):
            rope = self.rope_embed(H=grid[0], W=grid[1])
        else:
            x = x + self.positions(grid, square=image.shape[2] == image.shape[3])
        registers = getattr(self, "register_tokens", getattr(self, "storage_tokens", None))
        if registers is not None:
            x = torch.cat([x[:, :1], registers.expand(len(image), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x, rope)
        return self.head(self.norm(x)[:, 0])

    def positions(self, grid: tuple[int, int], *, square: bool) -> Tensor:
        """Return positions for a grid of patches ``[1 pos width]``, resized where it is not the native one."""
        if grid[0] * grid[1] == math.prod(self.grid) and square:
            return self.pos_embed
        table = self.pos_embed.float() if self.interpolate_in_float32 else self.pos_embed
        patches = table[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)
        if self.interpolate_offset:
            scales = [
                (length + self.interpolate_offset) / native for length, native in zip(grid, self.grid, strict=True)
            ]
            patches = F.interpolate(patches, scale_factor=scales, mode="bicubic", antialias=self.interpolate_antialias)
        else:
            patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=self.interpolate_antialias)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1).to(self.pos_embed.dtype)


class PatchEmbed(nn.Module):
    """Pixels to a grid of tokens ``[batch row column width]``."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.proj = nn.Conv2d(arch.in_channels, arch.width, arch.patch, stride=arch.patch)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).permute(0, 2, 3, 1)


class RopePositions(nn.Module):
    """Sines and cosines of the angles by which DINOv3 turns queries and keys of patches."""

    normalize_coords = "separate"
    dtype = torch.float32

    def __init__(self, arch: Architecture):
        super().__init__()
        self.register_buffer("periods", torch.ones(arch.periods))

    def forward(self, *, H: int, W: int) -> tuple[Tensor, Tensor]:
        centres = [
            (torch.arange(length, dtype=self.dtype, device=self.periods.device) + 0.5) / length for length in (H, W)
        ]
        grid = 2.0 * torch.stack(torch.meshgrid(*centres, indexing="ij"), dim=-1).flatten(0, 1) - 1.0
        angles = (2 * math.pi * grid[..., None] / self.periods).flatten(1).tile(2)
        return angles.sin(), angles.cos()


class Block(nn.Module):
    """Attention and MLP, each behind a norm and before a layer scale."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.width, eps=arch.eps)
        self.attn = Attention(arch)
        self.ls1 = LayerScale(arch.width) if arch.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(arch.width, eps=arch.eps)
        self.mlp = {"plain": Mlp, "packed": PackedSwiGLU, "split": SplitSwiGLU}[arch.mlp](arch)
        self.ls2 = LayerScale(arch.width) if arch.layer_scale else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MaskedLinear(nn.Linear):
    """A linear layer whose bias is multiplied with a mask: DINOv3's keys have none."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out)
        self.register_buffer("bias_mask", torch.ones(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class Attention(nn.Module):
    """Softmax attention; ``fused`` says whether by one kernel or step by step."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.num_heads, self.scale, self.fused = arch.heads, (arch.width // arch.heads) ** -0.5, True
        self.qkv = (
            MaskedLinear(arch.width, 3 * arch.width)
            if arch.masked_bias
            else nn.Linear(arch.width, 3 * arch.width, bias=arch.qkv_bias)
        )
        self.proj = nn.Linear(arch.width, arch.width, bias=arch.proj_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if rope is not None:
            q, k = (turned(part, *rope) for part in (q, k))
        if self.fused:
            z = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            z = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1) @ v
        return self.proj(z.transpose(1, 2).flatten(2))


def turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Return queries or keys ``[batch head pos d_head]`` with those of patches turned."""
    prefix, patches = x.to(sin.dtype).split([x.shape[-2] - sin.shape[-2], sin.shape[-2]], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    patches = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([prefix, patches], dim=-2).to(x.dtype)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.fc1 = nn.Linear(arch.width, arch.d_mlp, bias=arch.ffn_bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(arch.d_mlp, arch.width, bias=arch.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PackedSwiGLU(nn.Module):
    """A gated MLP whose two input projections are one: DINOv2's giant."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.w12 = nn.Linear(arch.width, 2 * arch.d_mlp, bias=arch.ffn_bias)
        self.w3 = nn.Linear(arch.d_mlp, arch.width, bias=arch.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class SplitSwiGLU(nn.Module):
    """A gated MLP with two input projections: DINOv3's larger ones."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.w1, self.w2 = (nn.Linear(arch.width, arch.d_mlp, bias=arch.ffn_bias) for _ in range(2))
        self.w3 = nn.Linear(arch.d_mlp, arch.width, bias=arch.ffn_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))
