"""An activation by class token, registers, frame, row and column."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prisma_core.errors import InputError, NotApplicable
from prisma_core.errors.arguments import alive, expect, number
from prisma_core.spec.layout import Index, TokenLayout

_TOKENS = ("pos", "patch", "query_pos", "key_pos")
_FRAMES = ("frame", "query_frame", "key_frame")


class _Held(NamedTuple):
    """An activation, the axis of its tokens, and which tokens of which layout it holds there."""

    x: Tensor
    axes: list[str]
    axis: int
    kept: list[int]
    layout: TokenLayout


class TokenViews:
    """The part of an ``ActivationCache`` that knows where a token is.

    Most activations count all tokens along ``pos``. Where frames have an axis of their own (TimeSformer's space
    attention), ``pos`` and ``patch`` count one frame's.
    """

    store: MutableMapping[str, Tensor]
    axes: dict[str, str]
    layout: TokenLayout | None
    pos: Index | str | None

    def full_name(self, query: Any) -> str:
        raise NotImplementedError

    def patches(self, query: str, layer: int | None = None, *, axis: str | None = None) -> Tensor:
        """Return an activation of the patches as a grid: ``[batch row column d_model]`` of ``[batch pos d_model]``.

        Of a video: ``[batch frame row column d_model]``.

        Args:
            query: full name or shorthand.
            layer: the layer of a shorthand.
            axis: which token axis to unfold, where there are two (``"query_pos"``, ``"key_pos"``).

        Raises:
            InputError: the cache does not hold all patches.
        """
        held = self._held(query, layer, axis)
        grid = _grid(held)
        if "frame" not in held.axes:
            return grid
        frame = held.axes.index("frame") - len(held.axes) + held.x.ndim
        return grid.movedim(frame, held.axis - 1) if frame < held.axis else grid.movedim(frame + 1, held.axis)

    def frame(self, index: int, query: str, layer: int | None = None, *, axis: str | None = None) -> Tensor:
        """Return an activation of one frame's patches as a grid: ``[batch row column d_model]``.

        Args:
            index: the frame of patches; negative ones count from the end. Each spans the frames of one tubelet.
            query, layer: as for ``patches``.
            axis: which axis of tokens, or of frames, where there are two (``"query_frame"``, ``"key_frame"``).

        Raises:
            UnknownName: there is no such frame.
            InputError: the cache does not hold all of its patches.
        """
        layout, name, index = self._layout(), self._name(query, layer), number(index, "a frame")
        axes = self.axes.get(name, "").split()
        if not set(axes) & set(_FRAMES):
            size = (layout.rows, layout.columns)
            return self._subset(f"frame {index}", query, layer, axis, lambda x, at: torch.unflatten(x, at, size))
        layout.slice(f"frame {index}")  # refuses a frame that is not there
        held = self._held(query, layer, None if axis in _FRAMES else axis)
        frame_axis = _chosen(name, axes, _FRAMES, axis if axis in _FRAMES else None)
        at = axes.index(frame_axis) - len(axes) + held.x.ndim
        if held.x.shape[at] != layout.frames:
            raise InputError(f"{name} holds {held.x.shape[at]} frames; expected {layout.frames} of {layout!r}.")
        return _grid(held._replace(x=held.x.select(at, index), axis=held.axis - (at < held.axis)))

    def cls(self, query: str, layer: int | None = None, *, axis: str | None = None) -> Tensor:
        """Return an activation at the class token, its token axis gone: ``[batch d_model]``.

        Raises:
            NotApplicable: the model has no class token.
        """
        return self._subset("cls", query, layer, axis, lambda x, index: x.select(index, 0))

    def registers(self, query: str, layer: int | None = None, *, axis: str | None = None) -> Tensor:
        """Return an activation at the registers: ``[batch register d_model]``.

        Raises:
            NotApplicable: the model has no registers.
        """
        return self._subset("registers", query, layer, axis, lambda x, index: x)

    def _subset(
        self, subset: str, query: str, layer: int | None, axis: str | None, shape: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        held = self._held(query, layer, axis)
        tokens = range(held.layout.n_tokens)[held.layout.slice(subset)]
        if not tokens:
            raise NotApplicable(f"This model has no {subset} tokens; its tokens are {held.layout!r}.")
        if not set(tokens) <= set(held.kept):
            raise InputError(f"The {subset} tokens are not in the cache. Was it taken with a token slice?")
        columns = torch.tensor([held.kept.index(token) for token in tokens], device=held.x.device)
        return shape(held.x.index_select(held.axis, columns), held.axis)

    def _layout(self) -> TokenLayout:
        if self.layout is None:
            raise NotApplicable("The cache has no token layout, so which token is where is not known.")
        return self.layout

    def _name(self, query: str, layer: int | None) -> str:
        return self.full_name(query if layer is None else (query, layer))

    def _held(self, query: str, layer: int | None, axis: str | None) -> _Held:
        name, layout = self._name(query, layer), self._layout()
        axes = self.axes.get(name, "").split()
        axis = _chosen(name, axes, _TOKENS, axis)
        framed = bool(set(axes) & set(_FRAMES))
        layout = layout.one_frame() if framed else layout
        x = alive(self.store[name])
        index = axes.index(axis) - len(axes) + x.ndim
        kept = _kept(self.pos, axis, layout, framed=framed)
        if x.shape[index] != len(kept):
            raise InputError(f"{name} holds {x.shape[index]} tokens; expected {len(kept)} of {layout!r}.")
        return _Held(x, axes, index, kept, layout)


def _chosen(name: str, axes: list[str], known: Sequence[str], axis: str | None) -> str:
    """Return the one axis of a kind, the one asked for where there are several."""
    if axis is not None:
        expect(axis, str, "the name of an axis")
    axes_of_kind = [each for each in axes if each in known]
    if not axes_of_kind or (axis is not None and axis not in axes_of_kind):
        lacks = "token axis" if axis is None else repr(axis)
        raise InputError(f"{name} has the axes {' '.join(axes) or '(unknown)'}: no {lacks} among them.")
    if axis is None and len(axes_of_kind) > 1:
        either = " or ".join(f"axis={each!r}" for each in axes_of_kind)
        raise InputError(f"{name} has two {'token' if known is _TOKENS else 'frame'} axes: give {either}.")
    return axis or axes_of_kind[0]


def _grid(held: _Held) -> Tensor:
    every = list(range(held.layout.n_tokens))
    if held.kept not in (every, every[held.layout.slice("patches")]):
        raise InputError(f"The cache holds {len(held.kept)} of {len(every)} tokens, and not all patches.")
    return held.layout.grid(held.x, held.axis)


def _kept(pos: Index | str | None, axis: str, layout: TokenLayout, *, framed: bool) -> list[int]:
    """Return which tokens of a layout an axis holds in a cache that was cut to ``pos``."""
    every = list(range(layout.n_tokens))
    if axis == "patch":
        return every[layout.slice("patches")]
    if axis == "key_pos" or (framed and isinstance(pos, str) and pos.startswith("frame ")):
        return every
    return layout.positions(pos)
