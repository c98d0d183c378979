"""The canonical vision transformer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prisma_core.errors import InputError, MissingPart, NotApplicable
from prisma_core.errors.arguments import number, several, shown, tensor
from prisma_core.hooks.point import HookPoint, copy_if_cached
from prisma_core.inputs.checks import check_place
from prisma_core.model import Size, layer_index, read_sample
from prisma_core.spec import ModelSpec, RopeCount
from prisma_core.spec.layout import TokenLayout
from prisma_core.toolbox.arguments import checked
from prisma_core.toolbox.precision import joining
from prisma_core.transformer.attention import Rope
from prisma_core.transformer.block import STREAM, make_block
from prisma_core.transformer.embed import Embed, Grid, check_image, native_grid, native_shape, patch_grid
from prisma_core.transformer.norm import norm_or_identity
from prisma_core.transformer.pool import Pool
from prisma_core.transformer.rope import count_tables, grid_tables
from prisma_core.transformer.stream import StreamCache
from prisma_core.transformer.stream.readout import Readout, latent
from prisma_core.transformer.tower import Tower


class HookedViT(Tower):
    """A vision transformer whose every inside can be read and replaced; it takes images, or videos.

    Args:
        spec: the facts; weights are whatever the parts initialise themselves with until loaded.
        stem: upstream's own stem module, for specs whose stem is opaque.
    """

    spec: ModelSpec
    cache_type = StreamCache

    @checked
    def __init__(self, spec: ModelSpec, stem: nn.Module | None = None):
        super().__init__()
        self.spec = spec
        n_tokens = spec.layout.n_tokens
        self.embed = Embed(spec.embed, spec.layout, spec.d_model, stem)
        self.hook_embed = HookPoint("batch patch d_model", "the patches, projected")
        if spec.embed.pos:
            self.hook_pos_embed = HookPoint(STREAM, "the position embedding")
        added = ", plus pos_embed" if spec.embed.pos else ""
        self.hook_full_embed = HookPoint(STREAM, f"prefix tokens and embed{added}")
        if spec.ln_pre is not None:
            self.ln_pre = norm_or_identity(spec.ln_pre, spec.d_model)
            self.hook_ln_pre = HookPoint(STREAM, "ln_pre(full_embed)")
        self.blocks = nn.ModuleList(make_block(block, spec.d_model, n_tokens, spec.rope) for block in spec.blocks)
        if spec.rope is not None:
            shape = _rope_shape(spec)
            self.rope_cos = nn.Parameter(torch.ones(shape))
            self.rope_sin = nn.Parameter(torch.zeros(shape))
        if spec.ln_final is not None:
            self.ln_final = norm_or_identity(spec.ln_final, spec.d_model)
            self.hook_ln_final = HookPoint(STREAM, "ln_final(resid_post of the last block)")
        self.pool = Pool(spec.pool, spec.d_model, spec.d_pool)
        pooled = {"none": STREAM, "patches": "batch patch d_model"}.get(spec.pool.kind, "batch d_model")
        self.hook_pooled = HookPoint(pooled, f"{spec.pool.kind} pooling of the tokens, before ln_pool")
        self.ln_pool = norm_or_identity(spec.ln_pool, spec.d_pool, pooled)
        if spec.n_heads_out == 2:
            self.hook_pooled_dist = HookPoint(pooled, "the distillation token")
        if spec.n_classes is not None:
            self.head = nn.Linear(spec.d_pool, spec.n_classes)
            if spec.n_heads_out == 2:
                self.head_dist = nn.Linear(spec.d_pool, spec.n_classes)
        classes = "class" if spec.n_classes is not None else "d_model"
        self.hook_logits = HookPoint(pooled.replace("d_model", classes), _logits_equation(spec))

    def plain(self) -> HookedViT:
        return HookedViT(self.spec, self.embed.stem if self.spec.embed.stem == "opaque" else None)

    @property
    def layout(self) -> TokenLayout:
        """The token layout at the native size."""
        return self.spec.layout

    def layout_for(self, *inputs: Any) -> TokenLayout:
        rank = 1 + len(native_shape(self.spec))
        image = next((each for each in inputs if isinstance(each, Tensor) and each.ndim == rank), None)
        if image is None:
            return self.spec.layout
        layout, (*frames, rows, columns) = self.spec.layout, patch_grid(self.spec, image)
        grid = {"frames": (*frames, 1)[0], "rows": rows, "columns": columns}
        native = {side: getattr(layout, side) for side in grid}
        return layout if grid == native else layout.model_copy(update=grid)

    @property
    def fixed_layout(self) -> TokenLayout | None:
        fixed = self.spec.fixed_size and not self.spec.embed.any_length
        return self.spec.layout if fixed else None

    @property
    def leading_read(self) -> int | None:
        """How many tokens, from the first, the output is made of behind the last block; None where it is all."""
        if self.spec.pool.kind != "token":
            return None
        return 1 + self.spec.layout.cls if self.spec.n_heads_out == 2 else 1

    def sizes(self) -> list[Size]:
        embed, (height, width) = self.spec.embed, self.spec.image_size
        sizes: list[Size] = [(height, width)]
        if not self.spec.fixed_size:  # a larger one, and one that is not square
            down, across = embed.patch
            rows, columns = height // down, width // across  # a native size may leave pixels over, others may not
            sizes += [((rows + 2) * down, (columns + 2) * across), ((rows + 1) * down, max(1, columns - 1) * across)]
        if embed.tubelet is None or self.spec.n_frames is None:
            return sizes
        longer = [(self.spec.n_frames + 2 * embed.tubelet, height, width)] if embed.any_length else []
        return [(self.spec.n_frames, *size) for size in sizes] + longer

    def sample_inputs(
        self, batch: int = 1, *, size: Size | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        batch, shape = read_sample(batch, size, generator), list(native_shape(self.spec))
        if size is not None:
            shape = [*size[:-2], self.spec.embed.in_channels, *size[-2:]]
        return (torch.randn(batch, *shape, generator=generator, device="cpu"),)

    def forward(
        self,
        image: Tensor,
        *,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        grid: Grid | None = None,
        leading: int | None = None,
    ) -> Tensor:
        """Return the logits, or upstream's main output where it has no head.

        Args:
            image: ``[batch channel height width]``, a video ``[batch frame channel height width]`` for models that take
                those, or the residual stream ``[batch pos d_model]`` to go on from when ``start_at_layer`` is given.
            start_at_layer: the first block to run.
            stop_at_layer: return the residual stream before this block instead; negative counts from the end.
            grid: with ``start_at_layer``, rows and columns of the stream's patches (frames before them) where the
                input was not of the native size: rotary positions need them.
            leading: how many tokens, from the first, the last of these blocks computes behind its keys and values;
                None for all. The output needs ``leading_read`` of them.

        Raises:
            InputError: an input of another shape, pixels that are not numbers, or too few leading tokens.
        """
        n, read = len(self.blocks), self.leading_read
        leading = None if leading is None else number(leading, "leading", 0)
        needed = 1 if stop_at_layer is not None else read
        if leading is not None and (needed is None or leading < needed):
            what = "all tokens" if needed is None else f"{needed} or more"
            raise InputError(f"leading={leading} is too few: the tokens that are read on are {what}.")
        first, last = layer_index(start_at_layer, 0, n), layer_index(stop_at_layer, n, n)
        if first > last:
            raise InputError(f"stop_at_layer={stop_at_layer} is before start_at_layer={start_at_layer}.")
        if start_at_layer is None:
            if grid is not None:
                raise InputError(f"grid={shown(grid)} is of a stream: it goes with start_at_layer.")
            check_image(image, self.spec)
            check_place("image" if image.ndim == 4 else "video", image, self.embed.first_weight)
            grid = patch_grid(self.spec, image)
            x = self._embedded(image, grid)
            if self.spec.ln_pre is not None:
                x = self.hook_ln_pre(self.ln_pre(x))
        else:
            x, grid = self._stream(image, start_at_layer, grid)
        if x.shape[1] != self.layout.n_tokens and any(block.attn.bias for block in self.spec.blocks):
            raise InputError(
                f"Expected {self.layout.n_tokens} tokens, got {x.shape[1]}: the biases of this model's attention "
                "(attn_bias) are tables of the native size."
            )
        tables = self._rope_tables(grid)
        for index in range(first, last):
            cut = {} if leading is None or index < last - 1 else {"leading": leading}
            x = self.blocks[index](x, self._rope(index, tables), **cut)
        return x if stop_at_layer is not None else self.unembed(x)

    def _stream(self, stream: Tensor, layer: int, grid: Grid | None) -> tuple[Tensor, Grid]:
        """Return a residual stream to go on from, and the grid of its patches, both checked."""
        check_place("stream", tensor(stream, "a residual stream [batch pos d_model]"), self._weight_like(stream))
        native = native_grid(self.spec)
        grid = native if grid is None else tuple(number(n, "a side of the grid", 1) for n in several(grid, "a grid"))
        if len(grid) != len(native):
            raise InputError(f"Expected a grid of {len(native)} sides, such as {native}, got {shown(grid)}.")
        if stream.ndim != 3 or stream.shape[-1] != self.spec.d_model or stream.shape[1] == 0:
            raise InputError(
                f"start_at_layer={layer} needs a residual stream [batch pos {self.spec.d_model}], "
                f"got shape {list(stream.shape)}."
            )
        if self.spec.rope is not None and stream.shape[1] != self.spec.layout.n_prefix + math.prod(grid):
            axes = "(rows, columns)" if self.spec.n_frames is None else "(frames, rows, columns)"
            raise InputError(
                f"start_at_layer={layer} was given {stream.shape[1]} tokens, which are not "
                f"{self.spec.layout.n_prefix} and a grid of {'x'.join(map(str, grid))}: give grid={axes}."
            )
        return copy_if_cached(stream), grid

    def _embedded(self, image: Tensor, grid: Grid) -> Tensor:
        x = self.embed.with_prefix(self.hook_embed(self.embed(image)), self.blocks)
        if self.spec.embed.pos:
            pos = joining(self.embed.positions(grid), x, self.blocks)
            if self.hook_pos_embed.wanted:
                pos = self.hook_pos_embed(pos.expand(x.shape).clone())  # a cache must not see later edits of weights
            x = x + pos
        return self.hook_full_embed(x)

    @property
    def W_E(self) -> Float[Tensor, "pixel d_model"]:
        """The patch projection, a view: ``[channel*frame*row*column d_model]``, without ``frame`` for images.

        Raises:
            MissingPart: another module than one convolution makes the patches.
        """
        if not hasattr(self.embed, "proj"):
            raise MissingPart("This model's stem is upstream's own module, so there is no W_E: see model.embed.stem.")
        return self.embed.proj.weight.flatten(1).T

    @property
    def W_pos(self) -> Float[Tensor, "pos d_model"]:
        """The position embedding of the native size: ``[pos d_model]``, prefix tokens first.

        Raises:
            MissingPart: there is none, or it is factorized.
        """
        if not hasattr(self.embed, "pos_embed"):
            instead = "model.embed.pos_rows and pos_columns" if self.spec.embed.pos else "rotary tables or none at all"
            raise MissingPart(f"This model has no table of positions, so no W_pos: it has {instead}.")
        return self.embed.pos_embed

    def unembed(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch *out"]:
        """Return the logits of a residual stream ``[batch pos d_model]``: final norm, pooling, head."""
        self._check_stream(x)
        if self.spec.ln_final is not None:
            x = self.hook_ln_final(self.ln_final(x))
        pooled = self.ln_pool(self.hook_pooled(self.pool(x, self.spec.layout.n_prefix)))
        if self.spec.n_classes is not None:
            pooled = self.head(pooled)
        if self.spec.n_heads_out == 2:
            second = self.hook_pooled_dist(x[:, self.spec.layout.cls])
            pooled = (pooled + (self.head_dist(second) if self.spec.n_classes is not None else second)) / 2
        return self.hook_logits(pooled)

    def readout_names(self) -> list[str]:
        if self.spec.pool.attn is None:
            return []
        return ["pool.attn.hook_pattern", *(["pool.hook_mlp_out"] if self.spec.pool.mlp else [])]

    def readouts(self, store: Mapping[str, Tensor], *, n_tokens: int | None, tokens: Tensor | None) -> list[Readout]:
        spec, pool, n_prefix = self.spec, self.spec.pool, self.spec.layout.n_prefix
        heads = [self.head, *([self.head_dist] if spec.n_heads_out == 2 else [])] if spec.n_classes else [None]
        if pool.attn is not None:
            pattern, added = store["pool.attn.hook_pattern"], store.get("pool.hook_mlp_out")
            if pattern.shape[-3] != pool.attn.n_heads:
                raise NotApplicable(f"pool.attn.hook_pattern holds {pattern.shape[-3]} heads: cache all of them.")
            share = latent(pattern, pool.latents)
            share = share if pool.with_prefix else nn.functional.pad(share, (n_prefix, 0))
            return [Readout(heads[0], (share,), self.pool.attn, None if added is None else latent(added, pool.latents))]
        if pool.kind in ("none", "patches"):
            return [Readout(heads[0], ())]
        if n_tokens is None:
            raise NotApplicable("The cache has no token layout, so what the model pools is not known.")
        like, start = next(self.parameters()), 0 if pool.with_prefix else n_prefix
        places = torch.arange(n_tokens, device=like.device)
        first, second = ((places == token).to(like.dtype) for token in (0, spec.layout.cls))
        mean = (places >= start).to(like.dtype) / (n_tokens - start)
        if spec.n_heads_out == 2:
            both = [*heads, *([None] if len(heads) == 1 else [])]
            return [Readout(both[0], (first,)), Readout(both[1], (second,))]
        shares = {"token": (first,), "avg": (mean,), "token_and_avg": (first, mean)}[pool.kind]
        return [Readout(heads[0], shares)]

    @property
    def input_like(self) -> Tensor:
        first = self.embed.first_weight
        return super().input_like if first is None else first

    def _weight_like(self, stream: Tensor) -> Tensor | None:
        """Return a weight of a stream's dtype; of a model that has none, the first."""
        weights = (each for each in self.parameters() if each.dtype == stream.dtype)
        return next(weights, self.embed.first_weight)

    def _rope_tables(self, grid: Grid) -> Rope | None:
        rope, layout = self.spec.rope, self.spec.layout
        if rope is None:
            return None
        if rope.grid is None or grid == native_grid(self.spec):
            return Rope(self.rope_cos, self.rope_sin)
        like, prefix = self.rope_cos, layout.n_prefix
        if isinstance(rope.grid, RopeCount):
            return Rope(*count_tables(rope.grid, rope.layout, math.prod(grid), prefix, like.shape[-1], like))
        return Rope(*grid_tables(rope.grid, rope.layout, grid[-2], grid[-1], prefix, like))

    def _rope(self, layer: int, tables: Rope | None) -> Rope | None:
        if tables is None or self.spec.rope is None or not self.spec.rope.per_layer:
            return tables
        return Rope(tables.cos[layer], tables.sin[layer])


def _rope_shape(spec: ModelSpec) -> tuple[int, ...]:
    assert spec.rope is not None
    attn = spec.blocks[0].attn
    layers = (len(spec.blocks),) if spec.rope.per_layer else ()
    return (*layers, spec.layout.n_tokens, attn.n_heads if spec.rope.per_head else 1, attn.d_head)


def _logits_equation(spec: ModelSpec) -> str:
    read = "ln_pool(pooled)" if spec.ln_pool else "pooled"
    if spec.n_heads_out == 1:
        return read if spec.n_classes is None else f"head({read})"
    return "(pooled + pooled_dist) / 2" if spec.n_classes is None else "(head(pooled) + head_dist(pooled_dist)) / 2"
