"""Hook points, hooks, and the scopes in which they run.

A hook point is a place in the forward pass. It holds no hooks: when a pass reaches it, it asks a context variable for
the open scopes. So nothing is left on the model, threads and tasks do not see each other's hooks, and
``torch.compile`` guards on the open scopes and traces what they do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from prisma_core.errors import HookError
from prisma_core.errors.arguments import check_call, check_flags, expect, in_transform
from prisma_core.errors.migration import unknown_attribute
from prisma_core.hooks.query import layer_of
from prisma_core.hooks.recompute import checkpoints, keep


@dataclass(frozen=True)
class HookContext:
    """The place where a hook runs, its second argument.

    Attributes:
        name: the hook point's full name, as seen from the model the scope was opened on.
        axes: the names of the activation's axes, such as ``batch pos d_model``.
    """

    name: str
    axes: str

    def layer(self) -> int | None:
        """Return the layer of the hook point, or None outside the blocks."""
        return layer_of(self.name)

    def __getattr__(self, name: str) -> Any:
        raise unknown_attribute(self, name)


Hook: TypeAlias = Callable[[Tensor, HookContext], "Tensor | None"]
Capture: TypeAlias = Callable[[Tensor], None]
Value = TypeVar("Value")
_ORDER = itertools.count()


class HookPoint:
    """A named place where an activation can be read and replaced.

    Calling it returns its argument, or what the hooks of the open scopes make of it.

    Args:
        axes: names of the activation's axes.
        derived: computed only when a scope asks for it by name.
        equation: what the activation is, in the field's symbols.
    """

    __slots__ = ("axes", "derived", "equation", "key", "order")

    def __init__(self, axes: str, equation: str, *, derived: bool = False):
        self.order = next(_ORDER)  # modules make their hook points in the order in which they fire
        self.key = str(self.order)  # in scopes: torch.compile guards on which text it is, and not on which object
        self.axes = expect(axes, str, "the names of axes, such as 'batch pos d_model'")
        check_flags(derived=derived)
        self.derived = derived
        self.equation = expect(equation, str, "an equation in words")

    def __call__(self, x: Tensor) -> Tensor:
        scopes = OPEN_SCOPES.get()
        return _fire(scopes, self, x) if scopes and self.wanted else x

    @property
    def wanted(self) -> bool:
        """Whether an open scope reads or edits this point."""
        for scope in OPEN_SCOPES.get():  # noqa: SIM110  # asked 300 times a pass; any(...) takes twice as long
            if self.key in scope.touched:
                return True
        return False

    @property
    def edited(self) -> bool:
        """Whether an open scope may change the activation, or ask for its gradient."""
        return any(self.key in at for one in OPEN_SCOPES.get() for at in (one.edits, one.backward, one.splices))

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        """Take the state of another, as a copy: in the same order, and no scope of the other runs here."""
        for name, value in {**state[1], "key": str(next(_ORDER))}.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise unknown_attribute(self, name)

    def __repr__(self) -> str:
        return f"HookPoint({self.axes!r})"


@dataclass(eq=False)
class Placed:
    """Something at a hook point that some pass has to reach; ``at`` is the place, for hooks and for messages."""

    at: HookContext
    reached: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        return self.at.name


@dataclass(eq=False)
class PlacedHook(Placed):
    """A hook at a hook point, and the ``points`` of the model that its scope was opened on."""

    hook: Hook
    points: frozenset[HookPoint]

    def __call__(self, x: Tensor) -> Tensor | None:
        self.reached = True
        if torch.compiler.is_compiling():
            return self.hook(x, self.at)
        # A pass inside a hook is a pass of its own: scopes of this model, or of one that shares parts with it, pause.
        scopes = OPEN_SCOPES.get()
        OPEN_SCOPES.set(tuple(scope for scope in scopes if scope.points.isdisjoint(self.points)))
        try:
            return self.hook(x, self.at)
        except Exception as error:
            trace = error.__traceback__
            if isinstance(error, TypeError) and trace is not None and trace.tb_next is None:  # the call itself failed
                raise HookError(f"The hook at {self.name} cannot be called as hook(activation, at): {error}") from error
            error.add_note(f"in the hook at {self.name}")
            raise
        finally:
            opened = [scope for scope in OPEN_SCOPES.get() if scope not in scopes]
            OPEN_SCOPES.set((*(scope for scope in scopes if scope.is_open), *opened))


def check_hook(query: object, hook: object) -> None:
    """Refuse an object that cannot be called as ``hook(activation, at)``: a ``HookError`` with its own signature."""
    expected = "hook(activation, at), both by position"
    if isinstance(hook, nn.Module):
        expected += " (a module of one argument goes in as lambda activation, at: module(activation))"
    check_call(hook, 2, f"The hook for {query!r}", expected, HookError)


class Stop(Exception):
    """Ends a forward pass after the last activation that was asked for; caught by ``run_with_cache``."""


class Expected(Protocol):
    """A hook or a capture that some pass has to reach."""

    @property
    def name(self) -> str: ...
    @property
    def reached(self) -> bool: ...


class Splice(Protocol):
    """A function put in the place of an activation while a scope is open, with hook points of its own inside.

    Attributes:
        points: its hook points by name, in firing order. In the model they stand under the hook point that the splice
            is at: ``blocks.5.hook_resid_post.sae.hook_features``.
    """

    @property
    def points(self) -> Mapping[str, HookPoint]: ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """Return what goes on in the place of an activation; of the same shape, dtype and device."""
        ...


@dataclass(eq=False)
class PlacedSplice(Placed):
    """A splice at a hook point."""

    splice: Splice

    def __call__(self, x: Tensor) -> Tensor:
        self.reached = True
        return checked(self.splice(x.clone()), x, self.at, "splice", "activation")  # edits in place reach nothing else


@dataclass(eq=False)
class Scope:
    """Hooks and captures by the key of a hook point: splices run first, then edits, then gradient hooks, then captures.

    Closing a scope empties it, so it has no effect in any thread or task that still refers to it.

    Attributes:
        points: every hook point of the model that the scope is opened on.
        touched, shared: where something runs, while the scope is open; where other code may edit what is captured.
        backward: gradient hooks; an empty tuple makes the activation part of a graph.
        completed: by model, whether a pass ran to its end while the scope was open.
        expected: what has to be reached, with the model whose completed passes count, or None for surely.
        began: the calls of ``torch.utils.checkpoint`` in which the scope was opened.
        reads: whether it reads and no more, and was opened where no gradients are taken.
    """

    points: frozenset[HookPoint]
    splices: dict[str, PlacedSplice] = field(default_factory=dict[Any, Any])
    edits: dict[str, tuple[PlacedHook, ...]] = field(default_factory=dict[Any, Any])
    backward: dict[str, tuple[PlacedHook, ...]] = field(default_factory=dict[Any, Any])
    captures: dict[str, tuple[Capture, ...]] = field(default_factory=dict[Any, Any])
    completed: dict[nn.Module, bool] = field(default_factory=dict[Any, Any])
    expected: list[tuple[Expected, nn.Module | None]] = field(default_factory=list[Any])
    touched: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    is_open: bool = False
    began: tuple[FrameType, ...] = ()
    reads: bool = False

    def expect(self, item: Expected, owner: nn.Module | None) -> None:
        """Note what has to be reached if a pass of its owner runs to its end; without an owner, surely."""
        self.expected.append((item, owner))
        if owner is not None:
            self.completed[owner] = False

    def unreached(self) -> list[str]:
        """Return the names of what was expected and not reached."""
        return [x.name for x, owner in self.expected if not x.reached and (owner is None or self.completed[owner])]

    def open(self) -> None:
        """Add the scope to the open ones of this thread or task."""
        self.is_open, self.began = True, checkpoints()
        self.reads = not (torch.is_grad_enabled() or self.splices or self.edits or self.backward)
        self.touched = frozenset((*self.splices, *self.edits, *self.backward, *self.captures))
        self.shared = frozenset(key for key, at in self.captures.items() if any(getattr(x, "copy", False) for x in at))
        OPEN_SCOPES.set((*(scope for scope in OPEN_SCOPES.get() if scope.is_open), self))

    def close(self) -> None:
        """Empty the scope, and take it off the open ones of this thread or task."""
        self.is_open, self.touched, self.began = False, frozenset(), ()
        self.splices, self.edits, self.backward, self.captures, self.completed, self.expected = {}, {}, {}, {}, {}, []
        OPEN_SCOPES.set(tuple(scope for scope in OPEN_SCOPES.get() if scope.is_open))

    def again(self) -> Callable[[], ScopeContext[None]]:
        """Return what opens a scope in which the same runs once more."""
        kept = replace(self, completed={}, expected=[], is_open=False)
        return lambda: ScopeContext(replace(kept), None)


OPEN_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("prisma_scopes", default=())  # outermost first


class ScopeContext(AbstractContextManager[Value]):
    """A scope as a context manager, which may be left in any order with others, in another thread or task, and twice.

    Args:
        value: what entering it returns.
        kwargs: of the one pass in it, for messages.
    """

    def __init__(self, scope: Scope, value: Value, kwargs: Mapping[str, object] | None = None):
        self.scope, self.value, self.kwargs, self.entered = scope, value, kwargs or {}, False

    def __call__(self, *inputs: object) -> NoReturn:
        raise HookError("A scope is no model: enter it, as in `with model.hooks(...):`, and call the model inside.")

    def __enter__(self) -> Value:
        if self.entered:
            raise HookError("This scope was entered before. A scope is entered once: ask the model for another.")
        self.entered = True
        self.scope.open()
        return self.value

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        unreached = self.scope.unreached()
        self.scope.close()
        if kind is None and unreached:
            limits = ", ".join(f"{key}={value}" for key, value in self.kwargs.items() if value is not None)
            raise HookError(
                f"{unreached[0]} was not reached in this pass{f' ({limits})' if limits else ''}"
                f"{f', nor were {len(unreached) - 1} others' if len(unreached) > 1 else ''}. "
                "Ask only for hook points the pass goes through."
            )

    def __repr__(self) -> str:
        """Its state, and the hook points at which something runs in it: ``<scope, open: blocks.0.attn.hook_z>``."""
        names = list(dict.fromkeys(item.name for item, _ in self.scope.expected))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        state = "open" if self.scope.is_open else "closed" if self.entered else "not entered yet"
        return f"<scope, {state}{': ' if names else ''}{', '.join(names[:3])}{more}>"

    def __del__(self) -> None:
        if vars(self) and self.scope.is_open:  # entered by hand, and forgotten; torch.compile makes empty ones
            self.scope.close()


def keep_scopes(scopes: Sequence[Scope]) -> None:
    """Have what is being checkpointed, if anything is that gradients are taken of, computed again in these scopes."""
    if (torch.is_grad_enabled() or not all(scope.reads for scope in scopes)) and (calls := checkpoints()):
        for scope in scopes:
            keep(calls, scope, scope.began, scope.again, scope.reads)


def _fire(scopes: tuple[Scope, ...], point: HookPoint, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        x = x if torch.compiler.is_exporting() else torch.ops.prisma.in_scopes(x)  # looks for checkpoints when it runs
    else:
        keep_scopes(scopes)
    key, edited, differentiated, shared = point.key, False, False, False
    for scope in scopes:
        if (splice := scope.splices.get(key)) is not None:
            x = splice(x)
            edited = True
        for hook in scope.edits.get(key, ()):
            x = _hooked(hook, x, "activation")
            edited = True
        shared = shared or key in scope.shared
        differentiated = differentiated or key in scope.backward
    if shared or (edited and any(scope.captures for scope in scopes)):
        x = x.clone()  # a hook may hold on to its argument or its result, and a cache must not change
    if differentiated:
        x = _with_gradient_hooks(x, [hook for scope in scopes for hook in scope.backward.get(key, ())], point)
    for scope in scopes:
        for capture in scope.captures.get(key, ()):
            capture(x)  # not a copy: nothing below edits in place
    return x.clone() if shared else x


def _hooked(hook: PlacedHook, x: Tensor, what: str) -> Tensor:
    """Return what a hook makes of a copy of its own: edits in place reach nothing else."""
    copy = x.clone()
    value = cast(object, hook(copy))
    return checked(copy if value is None else value, x, hook.at, "hook", what)


def checked(value: object, x: Tensor, at: HookContext, who: str, what: str) -> Tensor:
    """Return what a hook or splice made of ``x``, if it fits in its place."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout != x.layout:
        kind = "a nested or sparse tensor" if isinstance(value, Tensor) else type(value).__name__
        none = f", or None to go on with the {what} it was given" if who == "hook" else ""
        raise HookError(
            f"The {who} at {at.name} returned {kind}; expected a tensor of shape {list(x.shape)} ({at.axes}){none}."
        )
    if value.shape != x.shape or value.dtype != x.dtype or value.device != x.device:
        raise HookError(
            f"The {who} at {at.name} returned {list(value.shape)} {value.dtype} on {value.device}; "
            f"expected the {what}'s {list(x.shape)} ({at.axes}) {x.dtype} on {x.device}."
        )
    return value


def _with_gradient_hooks(x: Tensor, hooks: Sequence[PlacedHook], point: HookPoint) -> Tensor:
    what = f"A backward hook at {hooks[0].name}" if hooks else f"A gradient by an activation ({point.equation})"
    if torch.compiler.is_compiling():
        raise HookError(f"{what} cannot run in a compiled model; run it eagerly.")
    if not torch.is_grad_enabled() or (in_transform() and not x.requires_grad):
        raise HookError(
            f"{what} would be lost: gradients are off there. Leave torch.no_grad(), take torch.func.grad inside "
            "torch.vmap and torch.func.jvp, and checkpoint with use_reentrant=False."
        )
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    y = x.view_as(x)  # a node of its own, so that hooks belong to this place and not to a shared tensor
    for hook in hooks:
        hook.reached = True
        y.register_hook(partial(_hooked, hook, what="gradient"))
    return y


def copy_if_cached(x: Tensor) -> Tensor:
    """Clone a tensor at the boundary between model and user if an open scope may have cached it."""
    return x.clone() if OPEN_SCOPES.get() else x
