"""A vision transformer that moves what some neurons do at patches into registers, as a part of its forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from prisma_core import HookedViT, HookPoint, ModelSpec


class Move(NamedTuple):
    """The neurons and values that are moved in one layer.

    Attributes:
        layer: which.
        neurons: of its MLP.
        first, last: the registers that take over, ``last`` not among them, as positions.
    """

    layer: int
    neurons: tuple[int, ...]
    first: int
    last: int


class MovingViT(HookedViT):
    """A vision transformer in which registers take over what some neurons do at patches.

    ``mlp.hook_post`` of the layers concerned holds what flows on: hooks and caches see what was moved.

    Args:
        spec: the facts.
        moves: what is moved, in this order.
        stem: upstream's own stem module, for specs whose stem is opaque.
    """

    def __init__(self, spec: ModelSpec, moves: Iterable[Move], stem: nn.Module | None = None):
        super().__init__(spec, stem)
        self.moves = tuple(moves)
        for layer in sorted({move.layer for move in self.moves}):
            mlp, here = self.blocks[layer].mlp, tuple(move for move in self.moves if move.layer == layer)
            mlp.hook_post = _MovingPoint(mlp.hook_post, here, spec.layout.n_prefix)

    @property
    def leading_read(self) -> int | None:
        return None  # registers are made of patches, so every token is computed

    def unsaved_behaviour(self) -> str | None:
        moves = "; ".join(
            f"layer {layer}, neurons {', '.join(map(str, neurons))}, to registers {first} to {last - 1}"
            for layer, neurons, first, last in self.moves
        )
        return f"moves neurons' activations from patches into registers at run time ({moves})"


class _MovingPoint(HookPoint):
    """A hook point that neurons' activations are moved in front of."""

    __slots__ = ("moves", "n_prefix")

    def __init__(self, point: HookPoint, moves: tuple[Move, ...], n_prefix: int):
        neurons = ", ".join(str(index) for move in moves for index in move.neurons)
        super().__init__(point.axes, f"{point.equation}, at neurons {neurons} moved from patches into registers")
        self.order = point.order  # it fires where that one did
        self.moves = moves
        self.n_prefix = n_prefix

    def __call__(self, x: Tensor) -> Tensor:
        x = x.clone()
        for move in self.moves:
            index = list(move.neurons)
            patches = x[:, self.n_prefix :, index]
            largest = patches.abs().argmax(1, keepdim=True)  # by size: a gated neuron may write with either sign
            x[:, move.first : move.last, index] = patches.gather(1, largest)
            x[:, self.n_prefix :, index] = 0
        return super().__call__(x)
