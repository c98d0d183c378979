"""Recorder of an upstream model's tensors at places, while it runs unchanged: the reference for hook points."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

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
        self._copies = [_Copy(place, self.tensors) for place in dict.fromkeys(places)]
        self._stack = ExitStack()

    def __enter__(self) -> dict[Place, Tensor]:
        for handle in attach(self.model, self._copies):
            self._stack.callback(handle.remove)
        self._stack.enter_context(watching(self._copies, batch=1))
        return self.tensors

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


class _Copy(Observer):
    """Keeps a copy of the tensor at a place, which upstream may edit in place later."""

    def __init__(self, place: Place, tensors: dict[Place, Tensor]):
        self.place = place
        self.tensors = tensors

    def passed(self, x: Tensor, batch: int) -> Tensor:
        self.tensors[self.place] = x.detach().clone()
        return x

    def missed(self) -> None:  # the check reports that upstream never passed the place
        pass


__all__ = ["Recorder"]
