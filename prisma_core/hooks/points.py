"""Where the hook points of a model are."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from prisma_core.hooks.point import HookPoint


class Points:
    """The hook points of a module and of all below it, found once.

    They are what submodules have as attributes, named by their path. Submodules are held weakly: what a module's own
    dictionary holds must not hold the module.

    Attributes:
        found: by full name, in firing order.
        owners: by full name, the path of the innermost module of a kind that a hook point lies in.
    """

    def __init__(self, root: nn.Module, kind: type[nn.Module]):
        self._seen = [
            (weakref.ref(module), tuple(module._modules), len(vars(module)), _points_of(module))  # pyright: ignore[reportPrivateUsage]
            for module in _preorder(root)
        ]
        paths = dict(cast("Iterator[tuple[str, nn.Module]]", root.named_modules()))
        placed = [
            (f"{path}.{attribute}" if path else attribute, point, path)
            for path, module in paths.items()
            for attribute, point in _points_of(module)
        ]
        placed.sort(key=lambda item: item[1].order)
        self.found = {name: point for name, point, _ in placed}
        kinds = [path for path, module in paths.items() if isinstance(module, kind)]
        self.owners = {name: max((own for own in kinds if _within(path, own)), key=len) for name, _, path in placed}

    def hold(self, root: nn.Module) -> bool:
        """Return whether the modules and the hook points are still those that were found."""
        left = [root]
        for module, children, size, points in self._seen:
            if not left:
                return False
            here = left.pop()
            inside = here.__dict__
            below: dict[str, nn.Module | None] = inside["_modules"]
            if module() is not here or len(inside) != size or tuple(below) != children:
                return False
            for attribute, point in points:
                if inside.get(attribute) is not point:
                    return False
            left.extend(child for child in below.values() if child is not None)
        return not left


def _preorder(root: nn.Module) -> Iterator[nn.Module]:
    """Yield modules in the order in which ``hold`` comes by them."""
    left = [root]
    while left:
        module = left.pop()
        yield module
        left.extend(child for child in module._modules.values() if child is not None)  # pyright: ignore[reportPrivateUsage]


def _points_of(module: nn.Module) -> tuple[tuple[str, HookPoint], ...]:
    inside: dict[str, Any] = vars(module)
    return tuple((attribute, value) for attribute, value in inside.items() if isinstance(value, HookPoint))


def _within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")
