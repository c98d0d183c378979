"""Hook points, and hooks as a scope.

A hook point is a place in the forward pass. It holds no hooks: when it is reached it asks a context variable for
the scope of the moment, so nothing is ever left on the model, threads do not see each other's hooks, and
``torch.compile`` guards on the scope and traces it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from prisma_core.errors import HookError
from prisma_core.hooks.query import layer_of


@dataclass(frozen=True)
class HookContext:
    """What a hook is told about where it runs.

    Attributes:
        name: the hook point's full name, as seen from the model the scope was opened on.
        axes: the names of the activation's axes, such as ``batch pos d_model``.
    """

    name: str
    axes: str

    def layer(self) -> int | None:
        """Return the layer of the hook point, or None outside the blocks."""
        return layer_of(self.name)


Hook: TypeAlias = Callable[[Tensor, HookContext], "Tensor | None"]
Capture: TypeAlias = Callable[[Tensor], None]


class Stop(Exception):
    """Ends a forward pass once everything asked for has been seen; never reaches the user."""


def _checked(value: object, given: Tensor, at: HookContext, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise HookError(
            f"The hook at {at.name} returned {type(value).__name__}; expected a tensor of shape "
            f"{list(given.shape)} ({at.axes}), or None to go on with the {what} it was given."
        )
    if value.shape != given.shape or value.dtype != given.dtype or value.device != given.device:
        raise HookError(
            f"The hook at {at.name} returned {list(value.shape)} {value.dtype} on {value.device}; "
            f"expected the {what}'s {list(given.shape)} ({at.axes}) {given.dtype} on {given.device}."
        )
    return value


class Placed:
    """A hook at a hook point.

    Attributes:
        reached: whether a pass has come by.
    """

    def __init__(self, hook: Hook, at: HookContext):
        self.hook = hook
        self.at = at
        self.reached = False

    def __call__(self, x: Tensor) -> Tensor | None:
        self.reached = True
        if torch.compiler.is_compiling():
            return self.hook(x, self.at)
        try:
            return self.hook(x, self.at)
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is None:  # the call itself failed
                told = f"The hook at {self.at.name} cannot be called as hook(activation, at)"
                raise HookError(f"{told}: {error}") from error
            error.add_note(f"in the hook at {self.at.name}")
            raise
        except Exception as error:
            error.add_note(f"in the hook at {self.at.name}")
            raise


def check_hook(query: object, hook: object) -> None:
    """Refuse what cannot be called as a hook is called.

    Raises:
        HookError: with what was given.
    """
    if not callable(hook):
        raise HookError(f"The hook for {query!r} is {type(hook).__name__}; expected hook(activation, at).")
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # written in C: the call will tell
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(hook, "__name__", type(hook).__name__)
        raise HookError(
            f"The hook for {query!r} is {name}{signature}; expected hook(activation, at), both by position: {error}."
        ) from error


class Passes:
    """Whether a pass of one model came to its end in a scope."""

    def __init__(self) -> None:
        self.ended = False


class Scope:
    """What happens at which hook points while it is active: edits first, then gradient hooks, then captures.

    Args:
        passes: for models whose passes matter to whoever opened the scope, where to note that one ended.
    """

    def __init__(
        self,
        edits: Mapping[HookPoint, tuple[Placed, ...]] | None = None,
        captures: Mapping[HookPoint, tuple[Capture, ...]] | None = None,
        backward: Mapping[HookPoint, tuple[Placed, ...]] | None = None,
        passes: Mapping[nn.Module, tuple[Passes, ...]] | None = None,
    ):
        self.edits = dict(edits or {})
        self.captures = dict(captures or {})
        self.backward = dict(backward or {})
        self.passes = dict(passes or {})
        self.points = {*self.edits, *self.captures, *self.backward}

    def inside(self, outer: Scope | None) -> Scope:
        """Return this scope nested in another: the outer one's hooks run first."""
        if outer is None:
            return self
        return Scope(
            _joined(outer.edits, self.edits),
            _joined(outer.captures, self.captures),
            _joined(outer.backward, self.backward),
            _joined(outer.passes, self.passes),
        )

    def fire(self, point: HookPoint, x: Tensor) -> Tensor:
        edits = self.edits.get(point)
        if edits is not None:
            for hook in edits:
                # A copy of its own for each hook: an edit in place must not reach what other places or caches hold.
                given = x.clone()
                value = hook(given)
                x = given if value is None else _checked(value, x, hook.at, "activation")
            if self.captures:
                x = x.clone()  # a hook may hold on to what it was given or returned, and a cache must not change
        backward = self.backward.get(point)
        if backward is not None:
            x = _with_gradient_hooks(x, backward)
        captures = self.captures.get(point)
        if captures is not None:
            for capture in captures:
                capture(x)  # not a copy: nothing below edits in place
        return x


def _joined(outer: Mapping[Any, Any], inner: Mapping[Any, Any]) -> dict[Any, Any]:
    return {**outer, **{place: outer.get(place, ()) + added for place, added in inner.items()}}


def _with_gradient_hooks(x: Tensor, hooks: tuple[Placed, ...]) -> Tensor:
    at = hooks[0].at
    if torch.compiler.is_compiling():
        raise HookError(f"A backward hook at {at.name} cannot run in a compiled model; run it eagerly.")
    if not torch.is_grad_enabled():
        raise HookError(f"A backward hook at {at.name} would never run: gradients are off. Leave torch.no_grad().")
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    y = x.view_as(x)  # a node of its own, so that hooks belong to this place and not to a shared tensor
    for hook in hooks:
        hook.reached = True
        y.register_hook(partial(_gradient, hook=hook))
    return y


def _gradient(grad: Tensor, hook: Placed) -> Tensor:
    given = grad.clone()
    value = hook(given)
    return given if value is None else _checked(value, grad, hook.at, "gradient")


_ORDER = itertools.count()
_ACTIVE: ContextVar[Scope | None] = ContextVar("prisma_scope", default=None)


class HookPoint:
    """A named place where an activation can be read and replaced.

    Calling it returns its argument, or what the hooks of the active scope make of it.

    Args:
        axes: names of the activation's axes.
        derived: computed only when a scope asks for it by name.
        equation: what the activation is, in the field's symbols.
    """

    __slots__ = ("axes", "derived", "equation", "order")

    def __init__(self, axes: str, equation: str, *, derived: bool = False):
        self.order = next(_ORDER)  # modules make their hook points in the order in which they fire
        self.axes = axes
        self.derived = derived
        self.equation = equation

    def __call__(self, x: Tensor) -> Tensor:
        scope = _ACTIVE.get()
        if scope is None:
            return x
        return scope.fire(self, x)

    @property
    def wanted(self) -> bool:
        """Whether the active scope reads or edits this point."""
        scope = _ACTIVE.get()
        return scope is not None and self in scope.points

    @property
    def edited(self) -> bool:
        """Whether the active scope may change what passes here, or ask for its gradient."""
        scope = _ACTIVE.get()
        return scope is not None and (self in scope.edits or self in scope.backward)

    def __repr__(self) -> str:
        return f"HookPoint({self.axes!r})"


def copy_if_cached(x: Tensor) -> Tensor:
    """Return what passes between a model and its user: a copy where a scope may keep it, for the user may edit it."""
    return x if _ACTIVE.get() is None else x.clone()


def ended(model: nn.Module) -> None:
    """Note that a pass of a model came to its end."""
    scope = _ACTIVE.get()
    if scope is not None and model in scope.passes:
        for passes in scope.passes[model]:
            passes.ended = True


@contextmanager
def activate(scope: Scope) -> Generator[None]:
    """Make a scope active for this thread, inside whichever is active already."""
    token = _ACTIVE.set(scope.inside(_ACTIVE.get()))
    try:
        yield
    finally:
        _ACTIVE.reset(token)
