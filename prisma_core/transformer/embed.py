"""From pixels to tokens with positions."""

from __future__ import annotations

import math
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.errors import InputError
from prisma_core.errors.arguments import expect, shown, sides, tensor
from prisma_core.inputs.checks import check_input, check_numbers, check_plain, input_kind, input_words
from prisma_core.spec import EmbedSpec, Interpolation, ModelSpec
from prisma_core.spec.layout import TokenLayout
from prisma_core.toolbox.precision import joining
from prisma_core.transformer.norm import norm_or_identity

Grid: TypeAlias = tuple[int, ...]  # rows and columns of patches, before them frames if it is a video


def native_grid(spec: ModelSpec) -> Grid:
    """Return the grid of patches of an input of the native size."""
    layout = spec.layout
    frames = () if spec.embed.tubelet is None else (layout.frames,)
    return (*frames, layout.rows, layout.columns)


def native_shape(spec: ModelSpec) -> tuple[int, ...]:
    """Return the shape of one image ``[channel height width]``, or video ``[frame channel height width]``."""
    frames = () if spec.n_frames is None else (spec.n_frames,)
    return (*frames, spec.embed.in_channels, *spec.image_size)


def patch_grid(spec: ModelSpec, image: Tensor) -> Grid:
    """Return the grid of patches of an input of the model, of any size."""
    embed = spec.embed
    frames = () if embed.tubelet is None else (image.shape[1] // embed.tubelet,)
    return (*frames, image.shape[-2] // embed.patch[0], image.shape[-1] // embed.patch[1])


class Embed(nn.Module):
    """The patch projection, the prefix tokens and the position embedding.

    Called with images it returns their patches, ``[batch patch d_model]``. An opaque stem returns a grid of tokens
    ``[batch row column d_model]``, or ``[batch patch d_model]``. Patches of videos run frame by frame.

    Attributes:
        prefix: class, distillation and register tokens, in the order of the layout: ``[prefix d_model]``.
        pos_embed: one row for every token of the native layout, zero where upstream adds none: ``[pos d_model]``.
        pos_rows, pos_columns: instead, where positions are factorized: ``[row d_model]``, ``[column d_model]``.
    """

    def __init__(self, spec: EmbedSpec, layout: TokenLayout, d_model: int, stem: nn.Module | None = None):
        super().__init__()
        self.spec = spec
        self.layout = layout
        if spec.tubelet is not None:
            tube = (spec.tubelet, *spec.patch)
            self.proj = nn.Conv3d(spec.in_channels, d_model, tube, stride=tube)
        elif spec.stem == "conv":
            self.proj = nn.Conv2d(spec.in_channels, d_model, spec.patch, stride=spec.patch)
        elif stem is not None:
            self.stem = stem
        self.norm = norm_or_identity(spec.norm, d_model, "batch patch d_model")
        if layout.n_prefix:
            self.prefix = nn.Parameter(torch.zeros(layout.n_prefix, d_model))
        self.pos_grid = spec.pos_grid or (layout.rows, layout.columns)
        if spec.pos and spec.pos_factorized:
            self.pos_rows = nn.Parameter(torch.zeros(self.pos_grid[0], d_model))
            self.pos_columns = nn.Parameter(torch.zeros(self.pos_grid[1], d_model))
        elif spec.pos:
            n_patches = layout.frames * math.prod(self.pos_grid)
            self.pos_embed = nn.Parameter(torch.zeros(layout.n_prefix + n_patches, d_model))

    @property
    def first_weight(self) -> Tensor | None:
        """The weight that pixels meet first; None where the stem has none."""
        made_here = self.spec.stem == "conv" or self.spec.tubelet is not None
        return self.proj.weight if made_here else next(self.stem.parameters(), None)

    def forward(
        self, image: Float[Tensor, "batch *frame channel height width"]
    ) -> Float[Tensor, "batch patch d_model"]:
        """Return the embedded patches ``[batch patch d_model]``."""
        if self.spec.tubelet is not None:
            grid = self.proj(image.transpose(1, 2)).permute(0, 2, 3, 4, 1)
        elif self.spec.stem == "conv":
            grid = self.proj(image).permute(0, 2, 3, 1)
        else:
            grid = self.stem(image)
        patches = grid.flatten(1, -2)
        return self.norm(patches.contiguous() if self.spec.by_token else patches)

    def with_prefix(
        self, x: Float[Tensor, "batch patch d_model"], blocks: nn.Module
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return patches with the prefix tokens before them: ``[batch pos d_model]``; ``blocks`` are the model's."""
        if not self.layout.n_prefix:
            return x
        return torch.cat([joining(self.prefix, x, blocks).expand(x.shape[0], -1, -1), x], dim=1)

    def positions(self, grid: Grid) -> Float[Tensor, "pos d_model"]:
        """Return the position embedding for a grid of patches: ``[pos d_model]``."""
        n_prefix, size = self.layout.n_prefix, (grid[-2], grid[-1])
        if self.spec.pos_factorized:
            rows = self._axis(self.pos_rows, size[0], max(size))
            columns = self._axis(self.pos_columns, size[1], max(size))
            patches = (rows[:, None] + columns[None, :]).flatten(0, 1)
            return torch.cat([patches.new_zeros(n_prefix, patches.shape[1]), patches])
        rounded = "" if self.spec.interpolation is None else self.spec.interpolation.rounded
        if size == self.pos_grid:
            return _rounded(self.pos_embed) if rounded == "native" else self.pos_embed
        prefix, patches = self.pos_embed[:n_prefix], self.pos_embed[n_prefix:]
        prefix = _rounded(prefix) if rounded == "prefix" else prefix
        how, frames = self.spec.interpolation or Interpolation(), self.layout.frames
        resized = [resize_positions(frame, how, self.pos_grid, size) for frame in patches.chunk(frames)]
        return torch.cat([prefix, *(frame.to(patches.dtype) for frame in resized)])

    def _axis(self, table: Tensor, length: int, longest: int) -> Tensor:
        how = self.spec.interpolation or Interpolation()
        whole = longest if how.square else length
        if whole == table.shape[0]:
            return table[:length]
        wide = rearrange(_wide(table, how), "p d -> 1 d p")
        return rearrange(F.interpolate(wide, whole, mode="linear"), "1 d p -> p d").to(table.dtype)[:length]


def resize_positions(
    table: Float[Tensor, "patch d_model"], how: Interpolation, native: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "resized d_model"]:
    """Resize positions from the native grid of patches to another, ``(rows, columns)`` both.

    Raises:
        InputError: the table has not as many rows as the native grid, or an argument is of another kind.

    Source: timm's ``resample_abs_pos_embed`` and its NaFlexVit; with an offset, Meta's DINO and DINOv2.
    """
    native, size = sides(native, "the native grid"), sides(size, "the grid")
    expect(how, Interpolation, "an Interpolation")
    if tensor(table, "positions [patch d_model]").ndim != 2 or len(table) != native[0] * native[1]:
        raise InputError(f"Expected positions [{native[0] * native[1]} d_model], got {shown(table)}.")
    if how.weights_in_float32:
        return _weighted(table, how, native, size)
    whole = (max(size), max(size)) if how.square else size
    # Channels last, as upstream's: for others torch's kernel repeats the first row where one column is asked for.
    grid = _wide(table, how).reshape(1, *native, -1).permute(0, 3, 1, 2)
    resize = partial(F.interpolate, mode=how.mode, align_corners=how.align_corners, antialias=how.antialias)
    if how.offset:
        scales = [(side + how.offset) / length for side, length in zip(whole, native, strict=True)]
        grid = resize(grid, scale_factor=scales)
    else:
        grid = resize(grid, whole)
    return rearrange(grid[:, :, : size[0], : size[1]], "1 d r c -> (r c) d")


def _weighted(table: Tensor, how: Interpolation, native: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the weighted sums of the four positions around each patch; antialiased, of all: ``[patch d_model]``.

    Source: transformers.vision_utils, and antialiased its Siglip2VisionEmbeddings, with the same operations in the
    same order.
    """
    if how.antialias:
        by_row, by_column = (_shares(*sides, table.device) for sides in zip(native, size, strict=True))
        weights = by_row[:, None, :, None] * by_column[None, :, None, :]
        return weights.flatten(2).flatten(0, 1) @ table.float()
    rows, by_row = _neighbours(how, native[0], size[0], table.device)
    columns, by_column = _neighbours(how, native[1], size[1], table.device)
    taken = rows[:, None, :, None] * native[1] + columns[None, :, None, :]
    weights = by_row[:, None, :, None] * by_column[None, :, None, :]
    return (table[taken.flatten(2)] * weights.flatten(2)[..., None]).sum(2).flatten(0, 1)


def _shares(native: int, length: int, device: torch.device) -> Tensor:
    """Return how much each place along a resized axis takes of each native one ``[length native]``."""
    scale = native / torch.tensor([length], dtype=torch.float32, device=device)
    centres = (torch.arange(length, dtype=torch.float32, device=device) + 0.5) * scale - 0.5
    distances = torch.arange(native, dtype=torch.float32, device=device) - centres[:, None]
    weights = (1 - distances.abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def _neighbours(how: Interpolation, native: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    index = torch.arange(length, dtype=torch.float32, device=device)
    at = index * (native - 1) / max(length - 1, 1) if how.align_corners else (index + 0.5) * native / length - 0.5
    before, both = at.floor(), torch.arange(2, device=device)
    weights = (1 - (at[:, None] - before[:, None] - both).abs()).clamp(min=0)
    return (before.long()[:, None] + both).clamp(0, native - 1), weights


def _rounded(x: Tensor) -> Tensor:
    return x.float().to(x.dtype)


def _wide(x: Tensor, how: Interpolation) -> Tensor:
    return x if x.dtype == torch.float64 and not how.in_float32 else x.float()


def check_image(image: Tensor, spec: ModelSpec) -> None:
    """Refuse an input of wrong rank, channels or size, or with values that are not numbers (``InputError``)."""
    what, embed = input_kind(native := native_shape(spec)), spec.embed
    image = check_input(image, native)
    check_plain(what, image)
    size = (image.shape[-2], image.shape[-1])
    if size != spec.image_size and spec.fixed_size:
        raise InputError(
            f"Expected {input_words(native)}, got shape {list(image.shape)}: this model takes one size. "
            "model.preprocess resizes, unless upstream's own processor leaves images at sizes of theirs: then resize "
            "them before."
        )
    if size != spec.image_size and (not all(size) or size[0] % embed.patch[0] or size[1] % embed.patch[1]):
        raise InputError(
            f"Expected height and width to be multiples of the patch {embed.patch[0]}x{embed.patch[1]}, "
            f"got {size[0]}x{size[1]}."
        )
    if embed.tubelet is not None and (n := image.shape[1]) != spec.n_frames:
        if not embed.any_length:
            raise InputError(f"Expected {input_words(native)}, got {n} frames: this model takes videos of one length.")
        if n % embed.tubelet or not n:
            raise InputError(f"Expected a multiple of {embed.tubelet} frames, got {n}.")
    check_numbers(what, image)
