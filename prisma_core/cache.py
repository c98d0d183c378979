"""What a pass left behind: activations by hook name, and their decompositions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from prisma_core.decompose import Decompositions
from prisma_core.errors import InputError, LoadError, NotApplicable, UnknownName, suggest
from prisma_core.files import read_safetensors
from prisma_core.keywords import elsewhere
from prisma_core.layout import TokenLayout
from prisma_core.names import LayerQuery, resolve_one, short_name
from prisma_core.views import TokenViews

if TYPE_CHECKING:
    from prisma_core.captures import Index
    from prisma_core.hooked import Hooked

_GRAD = "grad/"
_TOKENS = "given/tokens"
_METADATA = "prisma_cache"


class ActivationCache(TokenViews, Decompositions, Mapping[str, Tensor]):
    """Activations of one pass, by full hook name.

    ``cache["blocks.3.attn.hook_z"]``, ``cache["z", 3]`` and ``cache["resid_post", -1]`` all work; iteration gives full
    names. Nothing in a cache changes after the pass.

    Attributes:
        store: the activations themselves.
        model: the model that made them, needed for the decompositions.
        layout: which token is where, if the model knows.
        gradients: those of the loss by the same activations; None if ``run_with_cache`` was given no loss.
        has_batch_dim: whether the first axis is ``batch``.
        pos: the tokens kept, as they were asked for; None for all.
        tokens: those of the texts the model was given, ``[text pos]``, if it reads any.
    """

    def __init__(
        self,
        store: dict[str, Tensor],
        *,
        model: Hooked | None = None,
        layout: TokenLayout | None = None,
        has_batch_dim: bool = True,
        pos: Index | str | None = None,
        axes: Mapping[str, str] | None = None,
        tokens: Tensor | None = None,
    ):
        self.store = store
        self.model = model
        self.layout = layout
        self.gradients: ActivationCache | None = None
        self.has_batch_dim = has_batch_dim
        self.pos = pos
        self.tokens = tokens
        self._axes = axes

    @property
    def axes(self) -> Mapping[str, str]:
        """The axes of every hook point of the model, cached or not, by full name."""
        if self._axes is None:
            self._axes = {} if self.model is None else {n: p.axes for n, p in self.model.hook_points().items()}
        return self._axes

    @property
    def grad(self) -> ActivationCache:
        """The gradients of the loss by the same activations.

        Raises:
            NotApplicable: there was no loss.
        """
        if self.gradients is None:
            raise NotApplicable(
                "This cache holds no gradients: take it with run_with_cache(..., loss=function of the output)."
            )
        return self.gradients

    def __getattr__(self, name: str) -> Any:
        answer = elsewhere(name)
        raise AttributeError(f"ActivationCache has no attribute {name!r}{f': {answer}' if answer else '.'}")

    # ---------------------------------------------------------------- a mapping

    def __getitem__(self, query: str | LayerQuery) -> Tensor:
        """Return an activation by full name, shorthand, or shorthand and layer.

        Raises:
            UnknownName: the query names no hook point, several, or one that was not cached.
        """
        return self.store[self.full_name(query)]

    def full_name(self, query: str | LayerQuery) -> str:
        """Return the full name of the cached activation that a query means.

        Raises:
            UnknownName: as for an item.
        """
        if isinstance(query, str) and query in self.store:
            return query
        known = list(self.axes) or list(self.store)
        if isinstance(query, str):
            cached = [name for name in self.store if query in (short_name(name), name)]
            name = cached[0] if len(cached) == 1 else resolve_one(query, known)
        else:
            name = resolve_one(query, known)
        if name not in self.store:
            kept = sorted({short_name(each) for each in self.store})
            raise UnknownName(
                f"{name} is not in this cache, which holds {len(self)} activations ({', '.join(kept)}). "
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
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.store.values())
        return f"ActivationCache({len(self)} activations, {size / 2**20:.1f} MiB)"

    # ---------------------------------------------------------------- towers

    def tower(self, name: str) -> ActivationCache:
        """Return the part of the cache that is of one tower of its model, under the tower's own names.

        It is what ``model.vision.run_with_cache`` would have returned, and has its decompositions.

        Args:
            name: ``vision`` or ``text``.

        Raises:
            NotApplicable: the cache has no model, or one that is no pair of towers.
            UnknownName: there is no such tower.
        """
        towers: dict[str, Any] = getattr(self.model, "towers", dict)()
        names = [prefix.removesuffix(".") for prefix in towers if prefix]
        if not names:
            raise NotApplicable(
                "This cache has no model; set cache.model." if self.model is None else "This model has no towers."
            )
        if name not in names:
            raise UnknownName(f"No tower {name!r}; there are {', '.join(names)}.{suggest(name, names)}")
        tower, prefix = towers[f"{name}."], f"{name}."
        store = {each.removeprefix(prefix): x for each, x in self.store.items() if each.startswith(prefix)}
        how: dict[str, Any] = {"model": tower, "has_batch_dim": self.has_batch_dim, "pos": self.pos}
        how |= {"tokens": self.tokens} if tower.layout_of() is None else {"layout": self.layout}
        cache = ActivationCache(store, **how)
        cache.gradients = None if self.gradients is None else self.gradients.tower(name)
        return cache

    # ---------------------------------------------------------------- elsewhere, and other forms

    def _with(self, change: Callable[[str, Tensor], Tensor], **fields: Any) -> ActivationCache:
        kept: dict[str, Any] = {"has_batch_dim": self.has_batch_dim, "pos": self.pos, "axes": self._axes}
        store = {name: change(name, tensor) for name, tensor in self.store.items()}
        cache = ActivationCache(store, model=self.model, layout=self.layout, tokens=self.tokens, **(kept | fields))
        cache.gradients = None if self.gradients is None else self.gradients._with(change, **fields)
        return cache

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ActivationCache:
        """Return the cache on another device or in another dtype; this one stays as it is."""
        return self._with(lambda _, x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def remove_batch_dim(self) -> ActivationCache:
        """Return the same cache without the batch axis.

        Raises:
            InputError: the batch holds more than one.
        """
        if not self.has_batch_dim:
            return self
        return self._with(_alone, has_batch_dim=False)

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write the cache, gradients and all, to one safetensors file.

        Raises:
            InputError: the path does not end in ``.safetensors``.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"Expected a path that ends in .safetensors, got {path}.")
        grads = {} if self.gradients is None else self.gradients.store
        named = self.store | {_GRAD + name: grad for name, grad in grads.items()}
        named |= {} if self.tokens is None else {_TOKENS: self.tokens}
        facts = _File(
            names=list(named),
            axes=dict(self.axes),
            layout=self.layout,
            has_batch_dim=self.has_batch_dim,
            pos=self.pos if self.pos is None or isinstance(self.pos, str) else self.positions(),
        )
        # A copy of each: activations may share storage, which safetensors refuses.
        tensors = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in named.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={_METADATA: facts.model_dump_json()})
        return path

    @classmethod
    def load(cls, path: str | Path, model: Hooked | None = None) -> ActivationCache:
        """Read what ``save`` wrote.

        Args:
            path: the file.
            model: the model that made it, which the decompositions need.

        Raises:
            LoadError: the file is truncated, corrupt, no cache, or of a model with other hook points.
        """
        path = Path(path)
        tensors = read_safetensors(path)
        with cast(Any, safe_open(path, "pt")) as file:
            metadata = cast("dict[str, str] | None", file.metadata()) or {}
        if _METADATA not in metadata:
            raise LoadError(f"{path} holds tensors but no cache: expected a file written by ActivationCache.save.")
        try:
            facts = _File.model_validate_json(metadata[_METADATA])
        except ValidationError as error:
            raise LoadError(f"{path} does not describe a cache: {error}") from error
        if set(facts.names) != set(tensors):
            raise LoadError(f"{path} does not hold the tensors it names: was it written by something else?")
        if model is not None and facts.axes != {name: point.axes for name, point in model.hook_points().items()}:
            raise LoadError(f"{path} is a cache of another model: the hook points are not those of the model given.")
        how: dict[str, Any] = {
            "model": model,
            "layout": facts.layout,
            "has_batch_dim": facts.has_batch_dim,
            "pos": facts.pos,
            "axes": facts.axes,
            "tokens": tensors.get(_TOKENS),
        }
        own = [name for name in facts.names if not name.startswith(_GRAD) and name != _TOKENS]
        cache = cls({name: tensors[name] for name in own}, **how)
        grads = {name.removeprefix(_GRAD): tensors[name] for name in facts.names if name.startswith(_GRAD)}
        cache.gradients = cls(grads, **how) if grads else None
        return cache


class _File(BaseModel):
    """What a file of a cache says besides its tensors."""

    model_config = ConfigDict(extra="forbid")

    names: list[str]
    axes: dict[str, str]
    layout: TokenLayout | None
    has_batch_dim: bool
    pos: list[int] | str | None


def _alone(name: str, x: Tensor) -> Tensor:
    if x.shape[0] != 1:
        raise InputError(f"{name} holds a batch of {x.shape[0]}; the batch axis of one alone can go.")
    return x[0]
