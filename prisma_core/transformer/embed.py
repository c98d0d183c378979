"""From pixels to tokens with positions."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prisma_core.errors import InputError
from prisma_core.layout import TokenLayout
from prisma_core.spec import EmbedSpec
from prisma_core.transformer.norm import norm_or_identity

Grid: TypeAlias = tuple[int, int]


class Embed(nn.Module):
    """The patch projection, the prefix tokens and the position embedding.

    An opaque stem returns a grid of tokens ``[batch row column d_model]``, or ``[batch patch d_model]`` if there is only
    one size of image.

    Attributes:
        prefix: class, distillation and register tokens, in the order of the layout: ``[prefix d_model]``.
        pos_embed: one row for every token of the native layout, zero where upstream adds none: ``[pos d_model]``.
    """

    def __init__(self, spec: EmbedSpec, layout: TokenLayout, d_model: int, stem: nn.Module | None = None):
        super().__init__()
        self.spec = spec
        self.layout = layout
        if spec.stem == "conv":
            self.proj = nn.Conv2d(spec.in_channels, d_model, spec.patch, stride=spec.patch)
        elif stem is not None:
            self.stem = stem
        self.norm = norm_or_identity(spec.norm, d_model, "batch patch d_model")
        if layout.n_prefix:
            self.prefix = nn.Parameter(torch.zeros(layout.n_prefix, d_model))
        if spec.pos:
            self.pos_embed = nn.Parameter(torch.zeros(layout.n_tokens, d_model))

    def patches(self, image: Tensor) -> tuple[Tensor, Grid]:
        """Return the embedded patches ``[batch patch d_model]`` and their rows and columns."""
        if self.spec.stem == "conv":
            grid = self.proj(image).permute(0, 2, 3, 1)
        else:
            grid = self.stem(image)
            if grid.ndim == 3:
                grid = grid.unflatten(1, (self.layout.rows, self.layout.columns))
        return self.norm(grid.flatten(1, 2)), (grid.shape[1], grid.shape[2])

    def with_prefix(self, x: Tensor) -> Tensor:
        """Return patches with the prefix tokens before them: ``[batch pos d_model]``."""
        if not self.layout.n_prefix:
            return x
        return torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)

    def positions(self, size: Grid) -> Tensor:
        """Return the position embedding for a grid of patches: ``[pos d_model]``.

        Source: timm's ``resample_abs_pos_embed`` for another grid (bicubic, antialiased, in float32).
        """
        if size == (self.layout.rows, self.layout.columns):
            return self.pos_embed
        prefix, patches = self.pos_embed[: self.layout.n_prefix], self.pos_embed[self.layout.n_prefix :]
        grid = rearrange(patches.float(), "(r c) d -> 1 d r c", r=self.layout.rows)
        grid = F.interpolate(grid, size=size, mode="bicubic", antialias=True)
        return torch.cat([prefix, rearrange(grid, "1 d r c -> (r c) d").to(patches.dtype)])


def check_image(image: Tensor, spec: EmbedSpec, native: tuple[int, int]) -> None:
    """Refuse what the embedding cannot take, in words.

    Raises:
        InputError: wrong rank, channels, size, or values that are not numbers.
    """
    expected = f"[batch {spec.in_channels} {native[0]} {native[1]}]"
    if image.ndim != 4:
        hint = " Add a batch axis: image[None]." if image.ndim == 3 else ""
        raise InputError(f"Expected an image {expected}, got shape {list(image.shape)}.{hint}")
    if image.shape[1] != spec.in_channels:
        raise InputError(
            f"Expected {spec.in_channels} channels in {expected}, got shape {list(image.shape)}. "
            "model.preprocess makes the right tensor of any picture."
        )
    if not image.is_floating_point():
        raise InputError(f"Expected floating point pixels, got {image.dtype}. model.preprocess scales a picture.")
    size = (image.shape[2], image.shape[3])
    if size != native and spec.interpolation is None:
        raise InputError(
            f"Expected an image {expected}, got shape {list(image.shape)}: this model takes one size. "
            "model.preprocess resizes a picture."
        )
    if size != native and (size[0] % spec.patch[0] or size[1] % spec.patch[1]):
        raise InputError(
            f"Expected height and width to be multiples of the patch {spec.patch[0]}x{spec.patch[1]}, "
            f"got {size[0]}x{size[1]}."
        )
    # Looking at the pixels would stop a GPU's queue at every call, and cannot be traced.
    if image.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.isfinite(image).all():
        raise InputError(f"The image holds {int((~torch.isfinite(image)).sum())} values that are NaN or infinite.")
