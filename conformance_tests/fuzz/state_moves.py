"""Moves of an upstream model's state that no tensor of its state dict shows, one at a time, each undone at its end."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

NOTHING = object()
ROOTS = {"torch", "prisma_core"}  # whose classes every model shares: moved elsewhere, by hand
TREE = ("_modules", "_parameters", "_buffers")
SHARED = {*dir(nn.Module()), "_is_full_backward_hook", "_is_hf_initialized"}
BOOKS = ("_output_capturing_hooks_installed",)  # transformers' own, of hooks that it then sets again


class Move(NamedTuple):
    """One change of a model.

    Attributes:
        kind: of what.
        path: the module that it is made at.
        what: the change, for people.
        made: the scope in which it holds.
    """

    kind: str
    path: str
    what: str
    made: Callable[[], AbstractContextManager[None]]

    def __str__(self) -> str:
        return f"{self.kind} at {self.path!r}: {self.what}"


def bent(value: Any) -> Any:
    """Return a result with other numbers: no multiple, which a norm would undo."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x * 0.5 + (x.flip(-1) if x.ndim else 0.25)

    return pytree.tree_map(one, value)


def bending(function: Any) -> Any:
    """Return a user's function that changes what another returns."""

    def changed(*args: Any, **options: Any) -> Any:
        return bent(function(*args, **options))

    home = {**globals(), "__name__": "acme.patches"}
    return FunctionType(changed.__code__, home, "changed", None, changed.__closure__)


@contextmanager
def set_in(table: dict[Any, Any], name: Any, value: Any) -> Iterator[None]:
    """Set an entry of a dictionary, at its place; NOTHING takes it out."""
    before = dict(table)
    table[name] = value
    if value is NOTHING:
        del table[name]
    try:
        yield
    finally:
        table.clear()
        table.update(before)


@contextmanager
def set_on(kind: type, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a class."""
    before = vars(kind).get(name, NOTHING)
    setattr(kind, name, value)
    try:
        yield
    finally:
        if before is NOTHING:
            delattr(kind, name)
        else:
            setattr(kind, name, before)


@contextmanager
def of_class(module: nn.Module, kind: Any) -> Iterator[None]:
    """Give a module another class."""
    own = type(module)
    module.__class__ = kind
    try:
        yield
    finally:
        module.__class__ = own


@contextmanager
def with_hook(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def with_data(tensor: Tensor, values: Tensor) -> Iterator[None]:
    """Give a tensor other values, in place."""
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.copy_(values)
    try:
        yield
    finally:
        with torch.no_grad():
            tensor.copy_(before)


def slot(upstream: nn.Module, move: Move) -> tuple[object, ...]:
    """Return what moves of other cases have in common with one."""
    module = upstream.get_submodule(move.path)
    return type(module), re.sub(r"\d+", "#", move.path), move.kind, move.what


def moves(upstream: nn.Module) -> Iterator[Move]:
    """Yield the moves of every module; of those whose paths differ in numbers alone, of the last."""
    slots = {(type(one), re.sub(r"\d+", "#", path)): (path, one) for path, one in upstream.named_modules()}
    classes: set[type] = set()
    for path, module in slots.values():
        yield from of_behaviour(path, module)
        yield from of_methods(path, module)
        yield from of_attributes(path, module)
        yield from of_tensors(path, module)
        yield from of_children(path, module)
        if type(module) not in classes:
            classes.add(type(module))
            yield from of_classes(path, module)


def of_behaviour(path: str, module: Any) -> Iterator[Move]:
    kind = type(module)

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return bent(kind.forward(self, *args, **options))

    for home in ("acme.layers", kind.__module__):
        made = partial(_subclass, kind, home, forward)
        yield Move("subclass", path, home, partial(_with_subclass, module, made))
    own = module.forward
    yield Move("instance", path, "forward", lambda: set_in(vars(module), "forward", bending(own)))

    def after(part: Any, args: Any, result: Any) -> Any:
        return bent(result)

    def before(part: Any, args: Any, options: Any) -> Any:
        return bent(args), bent(options)

    yield Move("hook", path, "forward", lambda: with_hook(module.register_forward_hook, after))
    ahead = partial(module.register_forward_pre_hook, with_kwargs=True)
    yield Move("hook", path, "forward pre", lambda: with_hook(ahead, before))


def _subclass(kind: Any, home: str, forward: Any) -> Any:
    return type("Acme", (kind,), {"__module__": home, "forward": forward})


@contextmanager
def _with_subclass(module: nn.Module, made: Callable[[], Any]) -> Iterator[None]:
    with of_class(module, made()):
        yield


def methods_of(kind: type) -> list[str]:
    """The further methods that compute: of a class's own file, and of its bases that have a forward."""
    bases = [one for one in kind.__mro__ if one.__module__.partition(".")[0] not in (*ROOTS, "builtins", "abc")]
    bases = [one for one in bases if one.__module__ == kind.__module__ or "forward" in vars(one)]
    names = {name: None for one in bases for name, value in vars(one).items() if isinstance(value, FunctionType)}
    return [name for name in names if name not in SHARED and name != "forward" and not name.startswith("__")]


def of_methods(path: str, module: Any) -> Iterator[Move]:
    for name in methods_of(type(module)):
        if isinstance(bound := getattr(module, name, None), MethodType):
            yield Move("method", path, name, partial(set_in, vars(module), name, bending(bound)))


def of_classes(path: str, module: Any) -> Iterator[Move]:
    kind = type(module)

    def changed(function: Any) -> Any:
        return bending(function)

    for name in ("forward", *methods_of(kind)):
        owner = next(one for one in kind.__mro__ if name in vars(one))
        function = vars(owner)[name]
        if isinstance(function, FunctionType):
            yield Move("class", path, f"{owner.__name__}.{name}", partial(set_on, owner, name, changed(function)))


def other_values(value: Any) -> Iterator[Any]:
    """Yield other values of the kind of an attribute's own."""
    if isinstance(value, enum.Enum):
        yield from (one for one in type(value) if one != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 2 * value, value // 2, 0)
    elif isinstance(value, float):
        yield from (2 * value + 0.05, 0.0)
    elif isinstance(value, str):
        yield from WORDS.get(value, ())
    elif isinstance(value, torch.dtype):
        yield torch.float32
    elif isinstance(value, tuple | list):
        kind: Any = type(value) if type(value) in (tuple, list) else None
        if kind is not None:
            yield from (kind(other) for other in _inside(list(value)))
            yield kind(reversed(value))
            yield kind(value[:1])
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from ({**value, key: other} for other in other_values(one))
    elif value is None:
        yield from (True, 1, 0.5)
    if isinstance(value, int | float | tuple | list) and not isinstance(value, bool):
        yield None


def _inside(values: list[Any]) -> Iterator[list[Any]]:
    if values and isinstance(values[0], int | float) and not isinstance(values[0], bool):
        yield [2 * one for one in values]
        yield [one + 1 for one in values]
    for i in (len(values) - 1, 0) if values else ():
        yield from ([*values[:i], other, *values[i + 1 :]] for other in other_values(values[i]))


WORDS = {
    "none": ("tanh",),
    "tanh": ("none",),
    "zeros": ("reflect", "circular"),
    "bilinear": ("bicubic", "nearest"),
    "bicubic": ("bilinear",),
    "avg": ("token", "max", "avgmax"),
    "token": ("avg", "max"),
    "tok": ("avg", "argmax", "last"),
    "argmax": ("first", "last", "eos"),
    "last": ("first", "argmax"),
    "sdpa": ("eager",),
    "gelu": ("relu",),
}


def of_attributes(path: str, module: Any) -> Iterator[Move]:
    for name, value in list(vars(module).items()):
        if name in ("training", *BOOKS, *TREE, *SHARED) or isinstance(value, nn.Module):
            continue
        if isinstance(value, Tensor):
            yield Move("tensor", path, f"attribute {name}", partial(set_in, vars(module), name, _other(value)))
        elif callable(value) and not isinstance(value, type):
            for other in (bending(value), torch.relu, nn.functional.silu):
                yield Move("function", path, name, partial(set_in, vars(module), name, other))
        else:
            for other in other_values(value):
                what = f"{name} = {value!r:.40} -> {other!r:.40}"
                yield Move("attribute", path, what, partial(set_in, vars(module), name, other))


def _other(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return torch.where(tensor.isfinite(), tensor * 1.5 + 0.125, tensor.flip(-1) if tensor.ndim else tensor)
    if tensor.dtype == torch.bool:
        return ~tensor
    return tensor.flip(-1) if tensor.ndim else tensor + 1


def of_tensors(path: str, module: Any) -> Iterator[Move]:
    for name, tensor in list(module._parameters.items()):
        if tensor is not None:
            yield Move("tensor", path, f"{name} = None", partial(set_in, module._parameters, name, None))
            twice = nn.Parameter(tensor.detach() * 1.5 + 0.125, requires_grad=False)
            yield Move("tensor", path, f"another {name}", partial(set_in, module._parameters, name, twice))
    for name, tensor in list(module._buffers.items()):
        if tensor is not None:
            yield Move("tensor", path, f"buffer {name}", partial(with_data, tensor, _other(tensor)))


class Foreign(nn.Module):
    """A module of the user's in the place of another."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        return bent(self.inner(*args, **options))


def instead_of(child: nn.Module) -> Iterator[Any]:
    """Yield other modules that run where one does, most with the same tensors."""
    yield from (nn.Identity(), nn.Tanh(), nn.ReLU(), nn.SiLU(), Foreign(child), nn.Sequential(child, nn.Tanh()), None)
    yield nn.Sequential(child)
    if isinstance(child, nn.GELU):
        yield nn.GELU("tanh" if child.approximate == "none" else "none")
    if isinstance(child, nn.Linear):
        yield nn.Linear(child.in_features, child.out_features, bias=child.bias is None).to(child.weight.dtype)
    if isinstance(child, nn.LayerNorm):
        norm = nn.RMSNorm(child.normalized_shape, 1e-3).to(torch.float64)
        yield norm
        norm = nn.LayerNorm(child.normalized_shape, 1e-1).to(torch.float64)
        norm.load_state_dict(child.state_dict(), strict=False)
        yield norm


def of_children(path: str, module: Any) -> Iterator[Move]:
    children = module._modules
    for name, child in list(children.items()):
        if re.fullmatch(r"\d+", name) and name != str(len(children) - 1):
            continue
        if child is None:
            yield Move("swap", path, f"{name} = Tanh", partial(set_in, children, name, nn.Tanh()))
            continue
        for other in instead_of(child):
            what = f"{name} = {type(child).__name__} -> {other!r:.60}".replace("\n", " ")
            yield Move("swap", path, what, partial(set_in, children, name, other))
        if name.isdigit() and int(name):
            again = children[str(int(name) - 1)]
            yield Move("swap", path, f"{name} = the one before", partial(set_in, children, name, again))
            yield Move("swap", path, f"no {name}", partial(set_in, children, name, NOTHING))
