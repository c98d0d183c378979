"""Activations of one pass, by hook name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from prisma_core.errors import InputError, LoadError, MissingPart, UnknownName
from prisma_core.errors.arguments import alive, device_of, dtype_of, path_of, shown, unwrapped
from prisma_core.errors.migration import STREAM_METHODS, unknown_attribute
from prisma_core.files.checkpoint import read_with_header, write_safetensors
from prisma_core.files.facts import read_fields
from prisma_core.files.texts import parse_json
from prisma_core.hooks.capture import Keep
from prisma_core.hooks.query import LayerQuery, resolve_one, short_name
from prisma_core.spec.brief import aligned, folded, html_table
from prisma_core.spec.layout import Index, IndexSlice, TokenLayout, positions_of
from prisma_core.spec.views import TokenViews

_GRAD, _TOKENS, _METADATA = "grad/", "given/tokens", "prisma_cache"


@dataclass(eq=False, repr=False)
class ActivationCache(TokenViews, Mapping[str, Tensor]):
    """Activations of one pass, by full hook name.

    Nothing in a cache changes after the pass. Iteration gives full names; an item is asked for by full name,
    shorthand, or shorthand with layer and part of the block.

    Attributes:
        store: the activations themselves.
        axes: the axes of every hook point of the model, cached or not, by full name.
        model: the model that made them, for caches that read its weights.
        layout: which token is where, if the model knows.
        gradients: those of the loss by the same activations; None if ``run_with_cache`` was given no loss.
        has_batch_dim: whether the first axis is ``batch``.
        pos: the tokens kept, as they were asked for; None for all.
        tokens: those of the texts the model was given, ``[text pos]``, if it reads any.

    >>> cache = ActivationCache({f"blocks.{i}.ln1.hook_scale": torch.full((1, 17, 1), i) for i in range(2)})
    >>> cache["scale", -1].shape, cache["scale", 0, "ln1"][0, 0].item(), list(cache)[0]
    (torch.Size([1, 17, 1]), 0, 'blocks.0.ln1.hook_scale')
    """

    store: MutableMapping[str, Tensor]
    axes: dict[str, str] = field(default_factory=dict[str, str], kw_only=True)
    model: nn.Module | None = field(default=None, kw_only=True)
    layout: TokenLayout | None = field(default=None, kw_only=True)
    gradients: ActivationCache | None = field(default=None, kw_only=True)
    has_batch_dim: bool = field(default=True, kw_only=True)
    pos: Index | str | None = field(default=None, kw_only=True)
    tokens: Tensor | None = field(default=None, kw_only=True)

    @property
    def grad(self) -> ActivationCache:
        """The gradients of the loss by the same activations.

        Raises:
            MissingPart: there was no loss.
        """
        if self.gradients is None:
            raise MissingPart("This cache holds no gradients: take it with run_with_cache(..., loss=function).")
        return self.gradients

    def __getattr__(self, name: str) -> Any:
        if name in STREAM_METHODS:
            raise MissingPart(self._no_stream())
        if name == "tower":
            raise MissingPart(self._no_stream() if self.model is None else "This model has no towers.")
        raise unknown_attribute(self, name)

    def _no_stream(self) -> str:
        """Return why this cache has no decompositions."""
        if self.model is None:
            return (
                "Decompositions need the weights of a canonical transformer, and this cache has no model. "
                "Give it to ActivationCache.load(path, model=model)."
            )
        return (
            f"Decompositions and the logit lens need a canonical form, and this model ({type(self.model).__name__}) "
            "has none: there are no weights such as W_O to read. Its activations, edits and patches are all there is."
        )

    def positions(self) -> list[int] | None:
        """Return which tokens the cache holds along ``pos``, or None if it knows neither layout nor text."""
        if (n := self._n_tokens()) is None:
            return None
        places = self.layout.slice(self.pos) if self.layout is not None and isinstance(self.pos, str) else self.pos
        return positions_of(None if isinstance(places, str) else places, n)

    def _n_tokens(self) -> int | None:
        return None if self.layout is None else self.layout.n_tokens

    def keeps(self, cuts: Mapping[str, tuple[IndexSlice, ...]], **how: Any) -> dict[str, Keep]:
        """Return captures that fill the cache, by name; ``how`` is ``device``, ``dtype`` and ``detach``."""
        return {name: Keep(self.store, name, slices, **how) for name, slices in cuts.items()}

    # ---------------------------------------------------------------- a mapping

    def __getitem__(self, query: str | LayerQuery) -> Tensor:
        """Return an activation by full name, shorthand, or shorthand and layer.

        Raises:
            UnknownName: the query names no hook point, several, or one that was not cached.
        """
        return alive(self.store[self.full_name(query)])

    def full_name(self, query: str | LayerQuery) -> str:
        """Return the full name of the cached activation that a query means.

        Raises:
            UnknownName: as for an item.
        """
        if isinstance(query, str) and query in self.store:
            return query
        cached = [name for name in self.store if isinstance(query, str) and query == short_name(name)]
        name = cached[0] if len(cached) == 1 else resolve_one(query, list(self.axes) or list(self.store))
        if name not in self.store:
            shorthands = sorted({short_name(each) for each in self.store})
            raise UnknownName(
                f"{name} is not in this cache, which holds {len(self)} activations ({', '.join(shorthands)}). "
                f"Cache it: names=[{name!r}]."
            )
        return name

    def __iter__(self) -> Iterator[str]:
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)

    def __contains__(self, query: object) -> bool:
        try:
            return self.full_name(cast("str | LayerQuery", query)) in self.store
        except UnknownName:
            return False

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} activations, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """The bytes that the activations take; memory that several share counts once."""
        storages = [unwrapped(x).untyped_storage() for x in self._tensors()]
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())

    def _tensors(self) -> Iterable[Tensor]:
        return self.store.values()

    def _table(self) -> list[tuple[str, ...]]:
        """Return names with their axes, and make no activation for it; of layers that are alike, one row."""
        return folded((name, self.axes.get(name, "")) for name in self.store)

    def __str__(self) -> str:
        return "\n".join([repr(self), *aligned(self._table())])

    def _repr_html_(self) -> str:
        return html_table(repr(self), self._table())

    # ---------------------------------------------------------------- other devices and shapes

    def _with(self, change: Callable[[str, Tensor], Tensor], **fields: Any) -> ActivationCache:
        gradients = None if self.gradients is None else self.gradients._with(change, **fields)
        store = {name: change(name, tensor) for name, tensor in self.items()}
        return replace(self, store=store, gradients=gradients, **fields)

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationCache:
        """Copy the activations, those with a graph too; the model stays the cache's own."""
        memo |= {id(x): x.clone() for x in self._tensors() if id(x) not in memo}
        return replace(self, store=deepcopy(self.store, memo), gradients=deepcopy(self.gradients, memo))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> ActivationCache:
        """Return the cache on another device or in another dtype; this one stays as it is."""
        place, kind = device_of(device), dtype_of(dtype)
        return self._with(lambda _, x: x.to(device=place, dtype=kind if x.is_floating_point() else None))

    def remove_batch_dim(self) -> ActivationCache:
        """Return the same cache without the batch axis.

        Raises:
            InputError: the batch holds more than one.
        """
        return self._with(alone, has_batch_dim=False) if self.has_batch_dim else self

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write the cache, gradients and all, to one safetensors file.

        Raises:
            InputError: the path does not end in ``.safetensors``.
            LoadError: the disk is full, read-only, or refuses in another way; a file that was there is as it was.
        """
        grads = dict[str, Tensor]() if self.gradients is None else self.gradients.store
        named = dict(self) | {_GRAD + name: grad for name, grad in grads.items()}
        named |= {} if self.tokens is None else {_TOKENS: self.tokens}
        header = _File(
            names=list(named),
            axes=self.axes,
            layout=self.layout,
            has_batch_dim=self.has_batch_dim,
            pos=self.pos if self.pos is None or isinstance(self.pos, str) else self.positions(),
        )
        return write_safetensors(path, named, {_METADATA: header.model_dump_json()})

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> ActivationCache:
        """Read a file that ``save`` wrote.

        Args:
            path: the file.
            model: the hooked model that made it: the cache is then of the kind that ``run_with_cache`` returns.

        Raises:
            LoadError: the file is truncated, corrupt, no cache, or of a model with other hook points.
        """
        if model is not None and not hasattr(model, "cache_type"):
            raise InputError(f"Expected the hooked model that made the cache, got {shown(model)}.")
        tensors, text = read_with_header(path := path_of(path), _METADATA)
        if text is None:
            raise LoadError(f"{path} holds tensors but no cache: expected a file written by ActivationCache.save.")
        header = read_fields(_File, parse_json(text, path), f"{path} does not describe a cache")
        ndims = {name: len(axes.split()) - 1 + header.has_batch_dim for name, axes in header.axes.items()}
        if set(header.names) != set(tensors) or any(x.ndim != ndims.get(name, x.ndim) for name, x in tensors.items()):
            raise LoadError(f"{path} does not hold the tensors it names: was it written by something else?")
        if model is not None and header.axes != {name: point.axes for name, point in model.hook_points().items()}:
            raise LoadError(f"{path} is a cache of another model: the hook points are not those of the model given.")
        fields: dict[str, Any] = dict(header) | {"model": model, "tokens": tensors.pop(_TOKENS, None)}
        kind: type[ActivationCache] = cls if model is None else model.cache_type
        names = [name for name in fields.pop("names") if name in tensors]
        grads = {name.removeprefix(_GRAD): tensors[name] for name in names if name.startswith(_GRAD)}
        store = {name: tensors[name] for name in names if not name.startswith(_GRAD)}
        return kind(store, gradients=kind(grads, **fields) if grads else None, **fields)


class _File(BaseModel):
    """The header of a file of a cache."""

    model_config = ConfigDict(extra="forbid")

    names: list[str]
    axes: dict[str, str]
    layout: TokenLayout | None
    has_batch_dim: bool
    pos: list[int] | str | None


def alone(name: str, x: Tensor) -> Tensor:
    """Return the one of a batch of one."""
    if x.shape[0] != 1:
        raise InputError(f"{name} holds a batch of {x.shape[0]}; the batch axis of one alone can go.")
    return x[0]
