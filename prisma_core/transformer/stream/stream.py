"""The residual stream of one transformer, as a cache holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from prisma_core.errors import InputError, NotApplicable, UnknownName
from prisma_core.hooks.query import layer_of
from prisma_core.spec import ModelSpec, TextSpec
from prisma_core.spec.layout import Index, positions_of
from prisma_core.transformer.block import Block, SideBySide, check_sum, end_of
from prisma_core.transformer.norm import Norm
from prisma_core.transformer.recipes import RecipeCache
from prisma_core.transformer.tower import Tower

S = TypeVar("S", bound="Stream")


class Stream(RecipeCache):
    """The residual stream of one transformer, of images or of texts, in a cache."""

    def apply_slice_to_batch_dim(self: S, batch_slice: Index) -> S:
        """Return a cache of some of the images, or texts: the batch axis stays, also where one is chosen by number.

        Raises:
            InputError: the cache has no batch axis, or there is no such image.
        """
        if not self.has_batch_dim:
            raise InputError("This cache has no batch axis to choose from: has_batch_dim is False.")
        chosen = positions_of(batch_slice, self._n_batch())
        batch_slice = batch_slice if isinstance(batch_slice, slice) else chosen  # a slice is a view
        cache = self._with(lambda _, x: x[batch_slice])
        for each in (cache, cache.gradients):
            if each is not None and each.tokens is not None:
                each.tokens = each.tokens[batch_slice]
        return cast("S", cache)

    def _n_batch(self) -> int:
        return self._first().shape[0]

    def _first(self) -> Tensor:
        if not self.store:
            raise UnknownName("The cache is empty: it was taken with names that select nothing.")
        return next(iter(self.store.values()))

    def _n_tokens(self) -> int | None:
        if self.layout is not None:
            return self.layout.n_tokens
        spec = self._spec()
        if self.tokens is None or not isinstance(spec, TextSpec):
            return None
        return self.tokens.shape[-1] + int(spec.suffix)

    def _tower(self) -> Tower:
        if not isinstance(self.model, Tower):
            raise NotApplicable(self._no_stream())
        return self.model

    def _spec(self) -> ModelSpec | TextSpec:
        return self._tower().spec

    def _before(self, layer: int | None, mlp_input: bool = False) -> list[Block | SideBySide]:
        """The whole blocks before a place in the stream, which is the sum of what they add to it."""
        blocks = self._tower().layers()
        blocks = blocks[: end_of(blocks, layer, mlp_input)]
        check_sum(blocks)
        return blocks

    def _norms(self, layer: int | None, mlp_input: bool) -> list[tuple[str, Norm]]:
        """The norms through which the stream is read at a place, in order: the path of each, and the norm."""
        tower, blocks = self._tower(), self._tower().layers()
        end = end_of(blocks, layer, mlp_input)
        if end == len(blocks):
            check_sum(blocks)
            paths = ["ln_final", *(["ln_pool"] if self._spec().pool.kind not in ("attention", "token_and_avg") else [])]
        elif blocks[end].spec.kind in ("res_post", "post"):
            return []
        elif (n := blocks[end].spec.n_parallel) > 1:
            raise NotApplicable(f"Layer {end} reads the stream through {n} norms side by side.")
        else:
            paths = [f"blocks.{end}.{'ln2' if mlp_input else 'ln1'}"]
        norms = [(path, getattr(tower, path, None) if "." not in path else tower.get_submodule(path)) for path in paths]
        return [(path, norm) for path, norm in norms if isinstance(norm, Norm)]

    def _scale(self, path: str, pos_slice: Index | str | None) -> Tensor:
        """The cached scale of a norm, of every token that it norms: ``[*batch pos 1]``."""
        name = f"{path}.hook_scale"
        self._need([name])
        if path == "ln_pool" and self._spec().pool.kind != "none":
            return self.store[name] if self._reads_patches(path) else self.store[name][..., None, :]
        return self._at(name, pos_slice)

    def _reads_patches(self, path: str) -> bool:
        """Whether this is a norm of the patches alone, which prefix tokens do not go through."""
        return path == "ln_pool" and self._spec().pool.kind == "patches"

    def _without_prefix(self, x: Tensor, pos_slice: Index | str | None) -> Tensor:
        """The patches of ``[... pos any]``, for models whose every patch is read."""
        if self.layout is None or pos_slice is not None or self.pos is not None:
            raise NotApplicable("This model reads every patch by itself: take the stack and the cache whole.")
        return x[..., self.layout.n_prefix :, :]

    def _need(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.store]
        if not missing:
            return
        layers = len(self._tower().blocks)
        needed = dict.fromkeys(
            name if layer_of(name) is None or layers == 1 else f"blocks.*.{name.split('.', 2)[2]}" for name in names
        )
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UnknownName(f"The cache lacks {missing[0]}{more}. Cache them: names={list(needed)}.")

    def _at(self, name: str, pos_slice: Index | str | None) -> Tensor:
        x = self.store[name]
        return x if pos_slice is None else self._cut(x, 1 if self.has_batch_dim else 0, pos_slice)

    def _cut(self, x: Tensor, axis: int, pos_slice: Index | str | None) -> Tensor:
        columns = self._columns(pos_slice, x.shape[axis])
        return x.index_select(axis, torch.tensor(columns, device=x.device, dtype=torch.long))

    def _columns(self, pos_slice: Index | str | None, n: int) -> list[int]:
        """Indices along the cached token axis; an ``InputError`` for a subset of which the cache holds no token."""
        if not isinstance(pos_slice, str):
            return positions_of(pos_slice, n)
        cached = self.positions()
        if cached is None or self.layout is None:
            raise NotApplicable(f"The cache has no token layout, so pos_slice={pos_slice!r} means nothing.")
        tokens = self.layout.positions(pos_slice)
        columns = [index for index, token in enumerate(cached) if token in tokens]
        if not columns:
            raise InputError(f"The {pos_slice} tokens are not in the cache, which was taken with pos={self.pos!r}.")
        return columns
