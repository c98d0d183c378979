"""Activations of one pass, by hook name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from prisma_core.errors import InputError, LoadError, NotApplicable, UnknownName
from prisma_core.files.checkpoint import read_safetensors
from prisma_core.hooks.capture import positions_of
from prisma_core.hooks.keywords import elsewhere
from prisma_core.hooks.query import LayerQuery, resolve_one, short_name
from prisma_core.hooks.tokens import TokenLayout
from prisma_core.hooks.views import TokenViews

if TYPE_CHECKING:
    from prisma_core.hooks.capture import Index
    from prisma_core.hooks.point import HookPoint

_GRAD = "grad/"
_TOKENS = "given/tokens"
_METADATA = "prisma_cache"


# Methods of the residual stream: a cache of one canonical transformer has them.
STREAM_METHODS = frozenset(
    {
        "decompose_resid",
        "accumulated_resid",
        "stack_head_results",
        "stack_neuron_results",
        "apply_ln_to_stack",
        "project_stack",
        "logit_attrs",
        "logit_constant",
    }
)


class CachedModel(Protocol):
    """The part of a hooked model that a cache read from a file needs."""

    cache_type: type[ActivationCache]

    def hook_points(self) -> dict[str, HookPoint]: ...


class ActivationCache(TokenViews, Mapping[str, Tensor]):
    """Activations of one pass, by full hook name.

    ``cache["blocks.3.attn.hook_z"]``, ``cache["z", 3]`` and ``cache["resid_post", -1]`` all work; iteration gives full
    names. Nothing in a cache changes after the pass.

    Attributes:
        store: the activations themselves.
        axes: the axes of every hook point of the model, cached or not, by full name.
        model: the model that made them, for caches that read its weights.
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
        axes: Mapping[str, str] | None = None,
        model: nn.Module | None = None,
        layout: TokenLayout | None = None,
        has_batch_dim: bool = True,
        pos: Index | str | None = None,
        tokens: Tensor | None = None,
    ):
        self.store = store
        self.model = model
        self.layout = layout
        self.gradients: ActivationCache | None = None
        self.has_batch_dim = has_batch_dim
        self.pos = pos
        self.tokens = tokens
        self.axes = dict(axes or {})

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
        if name in STREAM_METHODS:
            raise NotApplicable(self._no_stream())
        if name == "tower":
            need = "give it to ActivationCache.load(path, model=model)"
            raise NotApplicable(
                f"This cache has no model; {need}." if self.model is None else "This model has no towers."
            )
        answer = elsewhere(name)
        raise AttributeError(f"ActivationCache has no attribute {name!r}{f': {answer}' if answer else '.'}")

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
        n = self._n_tokens()
        if n is None:
            return None
        kept = self.layout.slice(self.pos) if self.layout is not None and isinstance(self.pos, str) else self.pos
        return positions_of(None if isinstance(kept, str) else kept, n)

    def _n_tokens(self) -> int | None:
        return None if self.layout is None else self.layout.n_tokens

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

    # ---------------------------------------------------------------- other devices and shapes

    def _with(self, change: Callable[[str, Tensor], Tensor], **fields: Any) -> ActivationCache:
        kept: dict[str, Any] = {"has_batch_dim": self.has_batch_dim, "pos": self.pos, "axes": self.axes}
        store = {name: change(name, tensor) for name, tensor in self.store.items()}
        cache = type(self)(store, model=self.model, layout=self.layout, tokens=self.tokens, **(kept | fields))
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
    def load(cls, path: str | Path, model: CachedModel | None = None) -> ActivationCache:
        """Read what ``save`` wrote.

        Args:
            path: the file.
            model: the model that made it: the cache is then of the kind that ``run_with_cache`` returns.

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
        kind = cls if model is None else model.cache_type
        cache = kind({name: tensors[name] for name in own}, **how)
        grads = {name.removeprefix(_GRAD): tensors[name] for name in facts.names if name.startswith(_GRAD)}
        cache.gradients = kind(grads, **how) if grads else None
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
