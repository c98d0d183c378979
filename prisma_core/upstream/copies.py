"""Copies of upstream modules, with the functions that were set on them: hooks, and forwards of their own."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from prisma_core.upstream.undeclared import HOOKS


def copy_module(upstream: nn.Module, *, copy: bool) -> nn.Module:
    """Copy a module's structure, and its tensors too unless ``copy`` is False: then both share them.

    A function that was set on one of its modules and closes over another is that of the copy, where it calls the
    copy's: ``attn.forward = lambda x: forward(x) / 2``, with ``forward = attn.forward`` from before.
    """
    tensors = () if copy else (*upstream.parameters(), *upstream.buffers())
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    parts = set(upstream.modules())
    pairs = {function: _rebound(function, parts) for function in _closures(parts)}
    memo |= {id(function): rebound for function, rebound in pairs.items()}
    copied = copying.deepcopy(upstream, memo)
    for function, rebound in pairs.items():
        for cell, new in zip(function.__closure__ or (), rebound.__closure__ or (), strict=True):
            if new is not cell:
                new.cell_contents = copying.deepcopy(cell.cell_contents, memo)
    return copied


def _closures(parts: set[nn.Module]) -> Iterator[FunctionType]:
    """Yield the functions set on modules that close over one of them, by themselves or through another function."""
    rest: list[Any] = []
    for module in parts:
        rest += [*vars(module).values(), *(hook for name in HOOKS for hook in vars(module)[name].values())]
    seen = set[FunctionType]()
    while rest:
        function = rest.pop()
        if isinstance(function, FunctionType) and function not in seen:
            seen.add(function)
            rest += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
            if any(_is_of(cell, parts) for cell in function.__closure__ or ()):
                yield function


def _is_of(cell: CellType, parts: set[nn.Module]) -> bool:
    """Whether a cell holds one of these modules, a method of one, or a function that closes over one."""
    if cell == CellType():
        return False
    value = cell.cell_contents
    if isinstance(value, FunctionType):
        return any(_is_of(inner, parts) for inner in value.__closure__ or () if inner is not cell)
    owner = value.__self__ if isinstance(value, MethodType) else value
    return isinstance(owner, nn.Module) and owner in parts


def _rebound(function: FunctionType, parts: set[nn.Module]) -> FunctionType:
    """Return a function with empty cells where it closes over these modules; it shares the others."""
    cells = tuple(CellType() if _is_of(cell, parts) else cell for cell in function.__closure__ or ())
    rebound = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    rebound.__kwdefaults__, rebound.__qualname__ = function.__kwdefaults__, function.__qualname__
    vars(rebound).update(vars(function))
    return rebound
