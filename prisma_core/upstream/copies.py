"""Copies of upstream modules, with the functions that were set on them: hooks, and forwards of their own."""

from __future__ import annotations

import copy as copying
import dis
import functools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from torch import Tensor, nn

from prisma_core.errors import UnsupportedArchitecture, qualified_name
from prisma_core.maps.reader import Reader
from prisma_core.upstream.replaced import COMPILED, HOOKS, PLAIN, TREE, home_of, is_original, name_of, names_in, root_of

NO_PARTS = (str, bytes, int, float, complex, Tensor, type, ModuleType, type(None))


def copy_module(
    upstream: nn.Module, *, copy: bool = True, hooks: bool = True, memo: dict[int, Any] | None = None
) -> nn.Module:
    """Copy a module's structure, and its tensors too unless ``copy`` is False: then both share them.

    A function that was set on one of its modules and holds another is that of the copy, where it calls the copy's:
    ``attn.forward = lambda x: forward(x) / 2``, with ``forward = attn.forward`` from before.

    >>> stem = copy_module(upstream.patch_embed, hooks=False)

    Args:
        hooks: False leaves them out. An adapter that runs a part of upstream to read it does so: a hook is for the
            user's passes, and the adapted model is refused for it, by its place.
        memo: what ``copy.deepcopy`` has copied so far; it grows.

    Raises:
        UnsupportedArchitecture: a function reaches a module by a global name, or is set on a class and holds one: the
            copy would run what it was copied from. Or a part cannot be copied.
    """
    memo = {} if memo is None else memo
    for module in upstream.modules():
        attributes = (value for value in vars(module).values() if isinstance(value, Tensor))
        for tensor in (*module.parameters(False), *module.buffers(False), *attributes):
            if not copy:
                memo[id(tensor)] = tensor
            elif not tensor.is_leaf:  # computed of parameters, by a hook or since: torch copies none such
                memo[id(tensor)] = tensor.detach().clone().requires_grad_()
    graph = _Graph(upstream)
    pairs = [(function, _unfilled(function, graph)) for function in graph.functions()]
    memo |= {id(function): rebound for function, rebound in pairs}
    bound = [(method, functools.partial(memo[id(method.__func__)])) for method in graph.methods()]
    memo |= {id(method): call for method, call in bound}  # deepcopy would leave the function of a method as it is
    before = dict(memo)
    try:
        copied = copying.deepcopy(upstream, memo)
    except Exception as error:
        parts = cast("Sequence[tuple[str, nn.Module]]", [*upstream.named_modules()])
        path, part = next(one for one in reversed(parts) if not _can_copy(one[1], before))
        problem = f"what it holds cannot be copied ({type(error).__name__}: {error})"
        raise Reader(part, path).unsupported(problem) from error
    for tensor, made in zip(upstream.parameters(), copied.parameters(), strict=True):
        if tensor is not made:  # torch copies no hooks of gradients
            for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                setattr(made, name, getattr(tensor, name) and OrderedDict(getattr(tensor, name)))
    for function, rebound in pairs:
        _fill(rebound, function, graph, memo)
    for method, call in bound:
        cast("Any", call).__setstate__((call.func, (copying.deepcopy(method.__self__, memo),), {}, {}))
    for part in () if hooks else copied.modules():
        for name in HOOKS:
            getattr(part, name).clear()
    return copied


def _can_copy(module: nn.Module, memo: Mapping[int, Any]) -> bool:
    try:
        copying.deepcopy(module, dict(memo))
    except Exception:  # noqa: BLE001  # of any class: a part's own method, or what it holds
        return False
    return True


class _Graph:
    """What is set on the modules of a model, and all that it holds or names, as far as it can be followed.

    Raises:
        UnsupportedArchitecture: a function that cannot be that of a copy.
    """

    def __init__(self, upstream: nn.Module):
        parts = set(upstream.modules())
        kinds = {kind for module in parts for kind in type(module).__mro__ if root_of(kind.__module__) not in PLAIN}
        shared = [value for kind in kinds for value in vars(kind).values()]
        own = [value for module in parts for name, value in vars(module).items() if name not in TREE]
        self._values: dict[int, Any] = {}
        above: dict[int, list[int]] = {}
        names: list[tuple[str, FunctionType, Any]] = []
        rest = [value for value in (*shared, *own) if not isinstance(value, NO_PARTS)]
        while rest:
            value = rest.pop()
            if id(value) in self._values:
                continue
            self._values[id(value)] = value
            if isinstance(value, nn.Module) and value in parts:
                continue
            named = [(name, value, each) for name, each in _named(value)] if isinstance(value, FunctionType) else []
            inside = [each for each in (*_held(value), *(each for *_, each in named)) if not isinstance(each, NO_PARTS)]
            for each in inside:
                above.setdefault(id(each), []).append(id(value))
            names += named
            rest += inside
        ends = [id(part) for part in parts]
        self._holding = set(ends)
        while ends:
            new = [one for one in above.get(ends.pop(), ()) if one not in self._holding]
            self._holding.update(new)
            ends += new
        for name, function, value in names:
            if self.holds(value):
                raise _left(upstream, f"{name_of(function)}, which reaches a module of it by the global name {name!r}")
        for module in parts:
            call = vars(module).get(COMPILED)
            if call is not None and not is_original(call, module, COMPILED):
                raise _left(upstream, f"{name_of(call)}, which stands in the place of a compiled one")
        for value in filter(self.holds, shared):
            raise _left(upstream, f"{name_of(value)}, set on a class, which holds a module of it")

    def holds(self, value: Any) -> bool:
        """Whether a value holds a module of the model, or is one."""
        return id(value) in self._holding

    def functions(self) -> list[FunctionType]:
        """Functions that hold a module of the model."""
        return [value for value in self._values.values() if isinstance(value, FunctionType) and self.holds(value)]

    def methods(self) -> list[MethodType]:
        """Methods made of such functions."""
        methods = [value for value in self._values.values() if isinstance(value, MethodType)]
        return [method for method in methods if self.holds(method.__func__)]


def _left(upstream: nn.Module, function: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        qualified_name(upstream),
        f"the function {function}: a copy of the model would run the module that it was copied from. Take it off "
        "before, or set one on the instance that holds the module itself (a function made inside another)",
    )


def _held(value: Any) -> Iterator[Any]:
    """Yield what a value holds."""
    if isinstance(value, FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if cell != CellType())
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, property):
        yield value.fget
    elif isinstance(value, dict):
        yield from (*dict.keys(value), *dict.values(value))
    elif isinstance(value, list | tuple | set | frozenset):
        yield from cast("Iterable[Any]", value)
    yield from getattr(cast("object", value), "__dict__", {}).values()


def _named(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function names in its file or notebook; and in other files and classes, by their attributes."""
    if root_of(home_of(function)) in PLAIN:
        return
    there = function.__globals__
    for name in _globals(function.__code__) & there.keys():
        value = there[name]
        yield name, value
        if isinstance(value, type) or (isinstance(value, ModuleType) and root_of(value.__name__) not in PLAIN):
            attributes = set(names_in(function.__code__)) & vars(value).keys()
            yield from ((f"{name}.{attribute}", vars(value)[attribute]) for attribute in attributes)


@functools.lru_cache(4096)
def _globals(code: CodeType) -> frozenset[str]:
    """The global names in a function's code, and in that of functions inside."""
    names = {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
    return frozenset(names.union(*(_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType))))


def _unfilled(function: FunctionType, graph: _Graph) -> FunctionType:
    """Return a function with empty cells where it holds a module of the model; it shares the others."""
    cells = tuple(
        CellType() if cell != CellType() and graph.holds(cell.cell_contents) else cell
        for cell in function.__closure__ or ()
    )
    return FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)


def _fill(rebound: FunctionType, function: FunctionType, graph: _Graph, memo: dict[int, Any]) -> None:
    """Give a function what another holds, copied where that is, or holds, a module of the model."""

    def copied(value: Any) -> Any:
        return copying.deepcopy(value, memo) if graph.holds(value) else value

    for cell, new in zip(function.__closure__ or (), rebound.__closure__ or (), strict=True):
        if new is not cell:
            new.cell_contents = copied(cell.cell_contents)
    if function.__defaults__:
        rebound.__defaults__ = tuple(map(copied, function.__defaults__))
    if function.__kwdefaults__:
        rebound.__kwdefaults__ = {name: copied(value) for name, value in function.__kwdefaults__.items()}
    rebound.__qualname__ = function.__qualname__
    vars(rebound).update({name: copied(value) for name, value in vars(function).items()})
