"""The residual stream of one transformer, as a cache holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from prisma_core.errors import InputError, NotApplicable, UnknownName
from prisma_core.hooks.cache import ActivationCache
from prisma_core.hooks.capture import positions_of
from prisma_core.hooks.query import layer_of
from prisma_core.spec import TextSpec
from prisma_core.transformer.tower import Tower

if TYPE_CHECKING:
    from prisma_core.hooks.capture import Index
    from prisma_core.transformer.block import Block


class Stream(ActivationCache):
    """The residual stream of one transformer, of images or of texts, in a cache."""

    def _n_tokens(self) -> int | None:
        if self.layout is not None:
            return self.layout.n_tokens
        spec = self._tower().spec
        if self.tokens is None or not isinstance(spec, TextSpec):
            return None
        return self.tokens.shape[-1] + int(spec.suffix)

    def _tower(self) -> Tower:
        if not isinstance(self.model, Tower):
            raise NotApplicable(self._no_stream())
        return self.model

    def _summed(self, end: int) -> Tower:
        """The transformer, if its stream is a sum of what blocks before ``end`` add to it."""
        tower = self._tower()
        for index in range(end):
            if block_of(tower, index).spec.kind == "post":
                raise NotApplicable(
                    f"Layer {index} norms the stream itself after each addition (post-norm, as BERT does), so the "
                    "stream is no sum of what was added to it. accumulated_resid, patterns and patches hold all the "
                    "same."
                )
        return tower

    def _end(self, layer: int | None, mlp_input: bool = False) -> int:
        tower = self._tower()
        n = len(tower.blocks)
        end = n if layer is None or layer == -1 else layer
        if not 0 <= end <= n:
            raise InputError(f"No layer {layer}: expected 0 to {n}, where {n}, -1 and None are the end of the stream.")
        if mlp_input and end == n:
            raise InputError("mlp_input speaks of a layer's MLP: give the layer.")
        if mlp_input and (block_of(tower, end).spec.mlp is None or block_of(tower, end).spec.kind == "parallel"):
            raise NotApplicable(f"Layer {end} has no MLP that reads the stream after its attention.")
        return end

    def _need(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.store]
        if not missing:
            return
        layers = len(self._tower().blocks)
        wanted = dict.fromkeys(
            name if layer_of(name) is None or layers == 1 else f"blocks.*.{name.split('.', 2)[2]}" for name in names
        )
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UnknownName(f"The cache lacks {missing[0]}{more}. Cache them: names={list(wanted)}.")

    def _at(self, name: str, pos_slice: Index | str | None) -> Tensor:
        x = self.store[name]
        if pos_slice is None:
            return x
        axis = 1 if self.has_batch_dim else 0
        return x.index_select(axis, torch.tensor(self._columns(pos_slice, x.shape[axis]), device=x.device))

    def _columns(self, pos_slice: Index | str | None, n: int) -> list[int]:
        """Indices along the cached token axis."""
        if not isinstance(pos_slice, str):
            return positions_of(pos_slice, n)
        kept = self.positions()
        if kept is None or self.layout is None:
            raise NotApplicable(f"The cache has no token layout, so pos_slice={pos_slice!r} means nothing.")
        wanted = positions_of(self.layout.slice(pos_slice), self.layout.n_tokens)
        return [index for index, token in enumerate(kept) if token in wanted]


def block_of(tower: Tower, index: int) -> Block:
    return cast("Block", tower.blocks[index])


@dataclass(frozen=True)
class Branch:
    """One attention or MLP of a block, with the norm and the layer scale that belong to it.

    Attributes:
        side: its number among those side by side.
    """

    path: str
    side: int
    module: nn.Module
    norm: nn.Module
    scale: nn.Module


def branches(tower: Tower, index: int, kind: Literal["attn", "mlp"]) -> list[Branch]:
    """Return the attentions or the MLPs of a block: one, several side by side, or none."""
    block = block_of(tower, index)
    if not hasattr(block, kind):
        return []
    norm = "ln1" if kind == "attn" or block.spec.kind == "parallel" else "ln2"
    scale = "ls1" if kind == "attn" else "ls2"
    found = [cast(nn.Module, getattr(block, name)) for name in (kind, norm, scale)]
    path = f"blocks.{index}.{kind}"
    if not isinstance(found[0], nn.ModuleList):
        return [Branch(path, 0, *found)]
    sides = zip(*(cast(nn.ModuleList, each) for each in found), strict=True)
    return [Branch(f"{path}.{side}", side, *parts) for side, parts in enumerate(sides)]
