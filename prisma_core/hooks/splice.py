"""Splices: functions in the place of activations, with hook points of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prisma_core.hooks.point import Capture, HookContext, HookPoint, checked


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
class PlacedSplice:
    """A splice at a hook point.

    Attributes:
        at: the place, for messages.
        reached: whether a pass has gone by.
    """

    splice: Splice
    at: HookContext
    reached: bool = False

    @property
    def name(self) -> str:
        return self.at.name

    def __call__(self, x: Tensor) -> Tensor:
        self.reached = True
        return checked(self.splice(x), x, self.at, "splice", "activation")


@dataclass(eq=False)
class PlacedRead:
    """A function that reads an activation on behalf of a splice elsewhere.

    Attributes:
        at: the place, for messages.
        reached: whether a pass has gone by.
    """

    read: Capture
    at: HookContext
    reached: bool = False

    @property
    def name(self) -> str:
        return self.at.name

    def __call__(self, x: Tensor) -> None:
        self.reached = True
        self.read(x)
