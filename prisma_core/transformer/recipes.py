"""Activations that are functions of others: a cache holds how they are made, until they are first asked for."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from prisma_core.errors import InputError
from prisma_core.errors.arguments import alive, in_transform
from prisma_core.hooks.cache import ActivationCache, alone
from prisma_core.hooks.capture import Keep
from prisma_core.hooks.point import HookPoint
from prisma_core.spec.layout import IndexSlice
from prisma_core.toolbox.query_rows import captures

STEPS = 8  # recipes made one from the other, as along the residual stream, before a tensor is stored again


def computed(
    point: HookPoint, function: Callable[..., Tensor], *operands: Tensor | None, value: Tensor | None = None
) -> Tensor:
    """Return ``function(*operands)`` after a hook point; caches that hold the operands hold it as a recipe.

    Args:
        function: gives the same bits in whatever thread. Sums do, and kernels that go row by row (softmax, norms); a
            GELU does not: its kernel computes the end of each thread's share in another way.
        operands: activations, parameters, constants.
        value: the result, where it is known already.
    """
    x = function(*operands) if value is None else value
    y = point(x)
    if y is x and point.wanted and not torch.compiler.is_compiling():  # no hook changed it
        for capture in captures(point):
            if isinstance(capture, RecipeKeep):
                capture.derive(x, function, operands)
    return y


@dataclass(frozen=True, eq=False)
class Recipe:
    """How an activation is made of others.

    Attributes:
        operands: stored tensors, recipes, constants; parameters are copied, as they may change.
        versions: of the tensors: edits in place count them up.
        steps: how many recipes are made for this one, with itself.
    """

    function: Callable[..., Tensor]
    operands: tuple[object, ...]
    versions: tuple[int, ...] = ()
    steps: int = 1

    @classmethod
    def of(cls, x: Tensor, function: Callable[..., Tensor], operands: list[object]) -> Recipe | None:
        """Return a recipe of ``x``; None where it takes more memory, or may not give the same bits later."""
        steps = 1 + max((each.steps for each in operands if isinstance(each, Recipe)), default=0)
        weights = sum(each.numel() for each in operands if isinstance(each, nn.Parameter))
        tensors = [x, *(each for each in operands if isinstance(each, Tensor))]
        # Edits in place of what is made in inference mode are not counted; a transform of torch.func ends.
        uncounted = in_transform() or any(each.is_inference() for each in tensors)
        if weights >= x.numel() or steps > STEPS or uncounted or _autocast(x.device.type):
            return None
        copies = tuple(each.detach().clone() if isinstance(each, nn.Parameter) else each for each in operands)
        return cls(function, copies, _versions(copies), steps)

    def make(self) -> Tensor:
        """Return the activation; an ``InputError`` where an operand was edited in place."""
        if self.is_edited:
            raise InputError("one of the activations that it is made of was edited in place")
        operands = [each.make() if isinstance(each, Recipe) else each for each in self.operands]
        kind = next(each.device.type for each in operands if isinstance(each, Tensor))
        plain = torch.autocast(kind, enabled=False) if _autocast(kind) else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), plain:
            return self.function(*operands)

    @property
    def is_edited(self) -> bool:
        """Whether an operand was edited in place."""
        return _versions(self.operands) != self.versions

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (self.function, self.operands, self.is_edited, self.steps)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that are held for it."""
        for each in self.operands:
            yield from each.tensors() if isinstance(each, Recipe) else [each] if isinstance(each, Tensor) else []


class Store(UserDict[str, Tensor]):
    """Activations by name.

    Attributes:
        data: what is held: tensors and recipes.
        seen: by identity, a tensor of the pass, what was kept of it, and the name.
    """

    def __init__(self, entries: Mapping[str, Tensor | Recipe]):
        super().__init__()
        self.data = cast(Any, dict(entries))
        self.seen: dict[int, tuple[ref[Tensor], tuple[IndexSlice, ...], str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.data,)

    def __getitem__(self, name: str) -> Tensor:
        entry = cast(object, self.data[name])
        try:
            if isinstance(entry, Recipe):
                entry = self.data[name] = entry.make()  # kept from now on, so that edits in place are not lost
        except InputError as error:
            raise InputError(f"{name} is gone: {error}. Edit a clone() of what a cache returns.") from None
        return alive(cast(Tensor, entry))

    def entry_of(self, x: object, slices: tuple[IndexSlice, ...]) -> object | None:
        """Return what is held of a tensor of the pass; None if it is not here with these slices."""
        tensor, kept, name = self.seen.get(id(x), (None, (), ""))
        return self.data.get(name) if tensor is not None and tensor() is x and kept == slices else None


class RecipeKeep(Keep):
    """Stores one activation, or the recipe of it."""

    def __call__(self, x: Tensor, *, cut: int | None = None) -> None:
        store, known = cast(Any, self.store), torch.compiler.is_compiling() or self.reached
        twin = None if known else store.entry_of(x, self.slices)
        super().__call__(x, cut=cut)
        if twin is not None:
            store.data[self.name] = twin
        elif not known:
            store.seen[id(x)] = (ref(x), self.slices, self.name)

    def derive(self, x: Tensor, function: Callable[..., Tensor], operands: tuple[object, ...]) -> None:
        """Replace the activation that was just stored by how it is made, if it is made of what is stored."""
        store = cast(Store, self.store)
        entry = store.entry_of(x, ())
        plain = isinstance(entry, Tensor) and entry.dtype == x.dtype and entry.device == x.device
        if self.slices or not self.detach or not plain:
            return
        known = [each is None or isinstance(each, nn.Parameter) for each in operands]
        entries = [each if one else store.entry_of(each, ()) for each, one in zip(operands, known, strict=True)]
        if any(each is None and not one for each, one in zip(entries, known, strict=True)):
            return
        recipe = Recipe.of(x, function, entries)
        if recipe is not None:
            store.data[self.name] = cast(Any, recipe)


@dataclass(eq=False, repr=False)
class RecipeCache(ActivationCache):
    """A cache that holds recipes in the place of activations that are functions of others in it."""

    keep_type = RecipeKeep

    def __post_init__(self) -> None:
        self.store = cast(Any, self.store if isinstance(self.store, Store) else Store(self.store))

    @property
    def _entries(self) -> dict[str, Tensor | Recipe]:
        return cast(Any, self.store).data

    def _tensors(self) -> Iterator[Tensor]:
        for entry in self._entries.values():
            yield from entry.tensors() if isinstance(entry, Recipe) else [entry]

    def remove_batch_dim(self) -> ActivationCache:
        if not self.has_batch_dim:
            return self
        store = {
            name: Recipe(partial(alone, name), (entry,)) if isinstance(entry, Recipe) else alone(name, entry)
            for name, entry in self._entries.items()
        }
        gradients = None if self.gradients is None else self.gradients.remove_batch_dim()
        return replace(self, store=cast(Any, Store(store)), gradients=gradients, has_batch_dim=False)


def _copied(function: Callable[..., Tensor], operands: tuple[object, ...], is_edited: bool, steps: int) -> Recipe:
    """Return a recipe of copied operands, which count their edits anew."""
    return Recipe(function, operands, (-1,) if is_edited else _versions(operands), steps)


def _versions(operands: tuple[object, ...]) -> tuple[int, ...]:
    return tuple(each._version for each in operands if isinstance(each, Tensor))  # pyright: ignore[reportPrivateUsage]


def _autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
