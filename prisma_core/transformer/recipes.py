"""Activations that are functions of others: a cache holds how they are made, until they are first asked for."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from prisma_core.errors import InputError
from prisma_core.errors.arguments import alive, in_any_autocast, in_transform
from prisma_core.hooks.cache import ActivationCache, alone
from prisma_core.hooks.capture import Keep
from prisma_core.hooks.point import OPEN_SCOPES, HookPoint
from prisma_core.spec.layout import IndexSlice
from prisma_core.toolbox.precision import unrounded

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
    scopes = OPEN_SCOPES.get()
    if scopes and y is x and not torch.compiler.is_compiling():  # no hook changed it
        for scope in scopes:
            for capture in scope.captures.get(point.key, ()):
                if isinstance(capture, RecipeKeep):
                    capture.derive(x, function, operands)
    return y


@dataclass(eq=False, slots=True)
class Recipe:
    """How an activation is made of others.

    Attributes:
        operands: stored tensors, recipes, constants; parameters are copied, as they may change.
        versions: of the tensors: edits in place count them up.
        steps: how many recipes are made for this one, with itself.
    """

    function: Callable[..., Tensor]
    operands: tuple[object, ...]
    versions: list[int] = field(default_factory=list[int])
    steps: int = 1

    def make(self) -> Tensor:
        """Return the activation; an ``InputError`` where an operand was edited in place."""
        if self.is_edited:
            raise InputError("one of the activations that it is made of was edited in place")
        operands = [each.make() if isinstance(each, Recipe) else each for each in self.operands]
        like = next(each for each in operands if isinstance(each, Tensor))
        with torch.inference_mode(False), torch.no_grad(), unrounded(like):
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
    """

    def __init__(self, entries: Mapping[str, Tensor | Recipe]):
        super().__init__()
        self.data = cast(Any, dict(entries))

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


@dataclass(eq=False, repr=False)
class RecipeKeep(Keep):
    """Stores one activation, or the recipe of it.

    Attributes:
        store: what a ``Store`` holds.
        seen: by identity, a tensor of the pass, and what is held of it with which slices; the tensor itself, or else
            a reference tells whether it is still that one.
    """

    seen: dict[int, tuple[ref[Tensor] | None, tuple[IndexSlice, ...], Tensor | Recipe]] = field(
        default_factory=dict[Any, Any]
    )

    def __call__(self, x: Tensor, *, cut: int | None = None) -> None:
        new = not torch.compiler.is_compiling() and self.name not in self.store
        super().__call__(x, cut=cut)
        if new:
            twin: Any = self._held(x, self.slices)
            if twin is not None:
                self.store[self.name] = twin
            else:
                kept = self.store[self.name]
                self.seen[id(x)] = (None if kept is x else ref(x), self.slices, kept)

    def _held(self, x: Tensor, slices: tuple[IndexSlice, ...] = ()) -> Tensor | Recipe | None:
        """Return what is held of a tensor of the pass; None if it is not here with these slices."""
        record = self.seen.get(id(x))
        if record is None or record[1] != slices:
            return None
        reference, _, held = record
        return held if held is x or (reference is not None and reference() is x) else None

    def derive(self, x: Tensor, function: Callable[..., Tensor], operands: Sequence[Tensor | None]) -> None:
        """Replace the activation that was just stored by how it is made, if it is made of what is stored.

        It stays where a recipe takes more memory, or may not give the same bits later.
        """
        # A transform of torch.func ends, and edits in place of what inference mode makes are not counted.
        if self.slices or not self.detach or in_any_autocast() or in_transform() or torch.is_inference_mode_enabled():
            return
        held = self._held(x)
        if held is not x and not (isinstance(held, Tensor) and held.dtype == x.dtype and held.device == x.device):
            return
        weights, steps = 0, 1
        made: list[object] = []
        for each in operands:
            entry: Any = None if each is None else self._held(each)
            if entry is None and each is not None:
                if not isinstance(each, nn.Parameter):
                    return
                weights += each.numel()
                entry = (each.detach() if torch.is_grad_enabled() else each).clone()  # a copy outside of any graph
            if type(entry) is Recipe:
                steps = max(steps, 1 + entry.steps)
            elif entry is not None and entry.is_inference():
                return
            made.append(entry)
        if steps <= STEPS and (not weights or weights < x.numel()):
            recipe: Any = Recipe(function, tuple(made), _versions(made), steps)
            self.store[self.name], self.seen[id(x)] = recipe, (ref(x), (), recipe)


@dataclass(eq=False, repr=False)
class RecipeCache(ActivationCache):
    """A cache that holds recipes in the place of activations that are functions of others in it."""

    def __post_init__(self) -> None:
        self.store = cast(Any, self.store if isinstance(self.store, Store) else Store(self.store))

    def keeps(self, cuts: Mapping[str, tuple[IndexSlice, ...]], **how: Any) -> dict[str, Keep]:
        store = cast(Store, self.store)
        how["seen"] = {}
        return {name: RecipeKeep(store.data, name, slices, **how) for name, slices in cuts.items()}

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
    return Recipe(function, operands, [-1] if is_edited else _versions(operands), steps)


def _versions(operands: Sequence[Any]) -> list[int]:
    return [each._version for each in operands if isinstance(each, Tensor)]  # pyright: ignore[reportPrivateUsage]
