"""Recorder of an upstream model's tensors at places, while it runs unchanged: the reference for hook points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import cycle
from typing import cast

from torch import Tensor, nn

from prisma_core.plugin import Place
from prisma_core.upstream.observer import Observer, attach, watching


class Recorder:
    """Context that reads upstream places during a pass.

    >>> with Recorder(model, [Place("blocks.0")]) as tensors:
    ...     model(image)
    >>> tensors[Place("blocks.0")].shape

    Raises:
        PrismaError: upstream has no such module.
    """

    def __init__(self, model: nn.Module, places: Iterable[Place]):
        self.model = model
        self.tensors: dict[Place, Tensor] = {}
        names: dict[nn.Module, list[str]] = {}
        modules = cast("Iterator[tuple[str, nn.Module]]", model.named_modules(remove_duplicate=False))
        for name, module in modules:
            names.setdefault(module, []).append(name)
        alike = {name: several for several in names.values() for name in several}
        self._copies = [_Copy(place, self.tensors, alike.get(place.module, [])) for place in dict.fromkeys(places)]
        self._stack = ExitStack()

    def __enter__(self) -> dict[Place, Tensor]:
        for handle in attach(self.model, self._copies):
            self._stack.callback(handle.remove)
        self._stack.enter_context(watching(self._copies, batch=1))
        return self.tensors

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


class _Copy(Observer):
    """Keeps a copy of the tensor at a place, which upstream may edit in place later.

    Args:
        names: of the place's module. Where it has several, its calls are theirs in turn.
    """

    def __init__(self, place: Place, tensors: dict[Place, Tensor], names: Sequence[str]):
        self.row = place
        self.place = replace(place, module=names[0]) if names else place
        self.tensors = tensors
        self.turns = cycle(name == place.module for name in names or [place.module])

    def passed(self, x: Tensor, batch: int) -> Tensor:
        if next(self.turns):
            self.tensors[self.row] = x.detach().clone()
        return x

    def missed(self) -> None:  # the check reports that upstream never passed the place
        pass


__all__ = ["Recorder"]
