"""The layout of tokens: class token, registers, patches by frame, row and column; and positions among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from einops import rearrange
from jaxtyping import Shaped
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from prisma_core.errors import InputError, UnknownName, suggest
from prisma_core.errors.arguments import expect, shown, tensor, whole
from prisma_core.spec.brief import BriefModel

Index = int | slice | Sequence[int] | Tensor
IndexSlice = tuple[int, "slice | list[int]"]  # an axis, and what to keep of it

_POS, _HEADS = ("pos", "query_pos"), ("head",)
_MOST = 1 << 20  # tokens: each has a name and a position


class TokenLayout(BriefModel):
    """The order of the tokens along the ``pos`` axis: class token, distillation token, registers, patches.

    Patches run row by row, frame by frame. ``pos`` counts all tokens.

    Attributes:
        order: ``row column frame``: patches run row by row, each with all of its frames.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cls: int = Field(default=0, ge=0)
    distillation: int = Field(default=0, ge=0)
    registers: int = Field(default=0, ge=0)
    frames: int = Field(default=1, ge=1)
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    order: Literal["frame row column", "row column frame"] = "frame row column"

    @model_validator(mode="after")
    def _countable(self) -> TokenLayout:
        if self.n_tokens > _MOST:
            raise ValueError(f"a layout of {self.n_tokens} tokens is larger than the {_MOST} that any model has")
        return self

    @property
    def n_prefix(self) -> int:
        return self.cls + self.distillation + self.registers

    @property
    def n_patches(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def n_tokens(self) -> int:
        return self.n_prefix + self.n_patches

    def slice(self, subset: str) -> slice:
        """Return the positions of a subset: cls, distillation, registers, prefix, patches, all, or one ``frame 3``.

        Frames are those of patches, counted from 0; negative ones count from the end. A token's own name stands for it
        alone: ``r0c1``, as ``token_names`` has them.

        Raises:
            UnknownName: the subset is none of these, or there is no such frame or token.
        """
        if expect(subset, str, "a subset of the tokens, such as 'cls'").startswith("frame "):
            return self._frame(subset)
        registers = self.cls + self.distillation
        subsets = {
            "cls": slice(0, self.cls),
            "distillation": slice(self.cls, registers),
            "registers": slice(registers, self.n_prefix),
            "prefix": slice(0, self.n_prefix),
            "patches": slice(self.n_prefix, self.n_tokens),
            "all": slice(0, self.n_tokens),
        }
        if subset in subsets:
            return subsets[subset]
        names = self.token_names()
        if subset in names:
            return slice(names.index(subset), names.index(subset) + 1)
        known = f"there are {', '.join(subsets)}, and the tokens {names[0]} to {names[-1]}"
        raise UnknownName(f"No token subset {shown(subset)}; {known}.{suggest(subset, subsets)}")

    def _frame(self, subset: str) -> slice:
        number, size = subset.removeprefix("frame "), self.rows * self.columns
        if not number.lstrip("-").isdecimal() or not -self.frames <= int(number) < self.frames:
            raise UnknownName(f"No {subset!r}: frames of patches run from 0 to {self.frames - 1}.")
        frame = int(number) % self.frames
        if self.order == "row column frame":
            return slice(self.n_prefix + frame, self.n_tokens, self.frames)
        return slice(self.n_prefix + frame * size, self.n_prefix + (frame + 1) * size)

    def positions(self, pos: Index | str | None) -> list[int]:
        """Return the positions of a subset by name or of an index, all for None, as numbers from 0.

        >>> TokenLayout(cls=1, rows=1, columns=2).positions("patches")
        [1, 2]

        Raises:
            UnknownName: there is no such subset.
            InputError: there is no such position, or no token in the subset.
        """
        if not isinstance(pos, str):
            return positions_of(pos, self.n_tokens)
        places = range(self.n_tokens)[self.slice(pos)]
        if not places:
            raise InputError(f"There are no {pos} tokens: the {self.n_tokens} tokens are {self!r}.")
        return list(places)

    def one_frame(self) -> TokenLayout:
        """Return the layout of a frame by itself: the prefix tokens and its patches."""
        return self.model_copy(update={"frames": 1})

    def grid(self, x: Shaped[Tensor, " ..."], axis: int = 1) -> Shaped[Tensor, " ..."]:
        """Return the patches of ``x`` with the ``pos`` axis unfolded to rows and columns.

        Layout: ``[... pos ...] -> [... row column ...]``, with a frame axis before them if there is more than one
        frame. A tensor that holds patches alone is taken as it is.

        >>> TokenLayout(rows=2, columns=3, cls=True).grid(torch.zeros(1, 7, 8)).shape
        torch.Size([1, 2, 3, 8])

        Raises:
            InputError: the axis holds neither all tokens nor just the patches.
        """
        axis = axis_of(axis, tensor(x, "an activation"))
        if x.shape[axis] == self.n_tokens:
            x = x.narrow(axis, self.n_prefix, self.n_patches)
        elif x.shape[axis] != self.n_patches:
            fits = [at for at, size in enumerate(x.shape) if size in (self.n_tokens, self.n_patches)]
            hint = f"Give the axis of tokens: axis={fits[0]}." if fits else "Was the cache taken with a token slice?"
            raise InputError(
                f"Axis {axis} holds {x.shape[axis]} positions; this layout has {self.n_tokens} tokens, "
                f"of which {self.n_patches} are patches. {hint}"
            )
        x = x.movedim(axis, 0)
        x = rearrange(
            x, f"({self.order}) ... -> frame row column ...", frame=self.frames, row=self.rows, column=self.columns
        )
        if self.frames == 1:
            return x[0].movedim((0, 1), (axis, axis + 1))
        return x.movedim((0, 1, 2), (axis, axis + 1, axis + 2))

    def token_names(self) -> list[str]:
        """Return a readable name for each position: ``cls``, ``reg0``, ``r3c5``, ``f1r3c5``."""
        names = ["cls"] * self.cls + ["dist"] * self.distillation + [f"reg{i}" for i in range(self.registers)]
        places = [f"r{row}c{column}" for row in range(self.rows) for column in range(self.columns)]
        if self.frames == 1:
            return names + places
        if self.order == "row column frame":
            return names + [f"f{frame}{place}" for place in places for frame in range(self.frames)]
        return names + [f"f{frame}{place}" for frame in range(self.frames) for place in places]


def axis_of(axis: int, x: Tensor) -> int:
    """Return an axis of a tensor, counted from 0: negative ones count from the end, others are an ``InputError``."""
    number = whole(axis)
    if number is None or not -x.ndim <= number < x.ndim:
        raise InputError(f"Expected the number of an axis of {list(x.shape)}, got {shown(axis)}.")
    return number % x.ndim


class Marked(list[int]):
    """The positions that a mask marks.

    Attributes:
        length: of the mask.
    """

    def __init__(self, mask: Tensor):
        super().__init__(cast("list[int]", mask.nonzero().flatten().tolist()))
        self.length = len(mask)


def check_places(places: Sequence[int], n: int, where: str) -> None:
    """Refuse positions that are not among the ``n`` of an axis (``where``, in words), and a mask of another length."""
    if isinstance(places, Marked) and places.length != n:
        raise InputError(f"A mask needs a truth value for each of {n} places on {where}; got {places.length}.")
    for each in places:
        if not -n <= each < n:
            raise InputError(f"No index {each} on {where}, which has {n} there.")


def indices(index: int | Sequence[int] | Tensor) -> list[int]:
    """Return positions given as a number, numbers, or a mask, as a list; at least one.

    Raises:
        InputError: they are not whole numbers, or none.
    """
    if isinstance(index, Marked):
        return index
    if (number := whole(index)) is not None:
        return [number]
    try:
        numbers = torch.as_tensor(index, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        numbers = torch.empty(())
    mixed = isinstance(index, list | tuple) and len({isinstance(each, bool) for each in index}) > 1
    empty = 0 in numbers.shape
    if numbers.ndim != 1 or mixed or (not empty and (numbers.is_floating_point() or numbers.is_complex())):
        raise InputError(
            f"Expected positions as whole numbers or a mask, got {shown(index)}. A subset of the tokens stands by "
            "itself: pos='cls'."
        )
    places = Marked(numbers) if numbers.dtype == torch.bool else cast("list[int]", numbers.tolist())
    if not places:
        raise InputError(f"Expected at least one position, got {shown(index)}, which is empty.")
    return places


def positions_of(index: Index | None, n: int) -> list[int]:
    """Return which of ``n`` places an index means, all for None; at least one, and negative ones count from the end.

    Raises:
        InputError: there is no such place.

    >>> positions_of([0, -1], 5)
    [0, 4]
    """
    places = range(n)
    if index is None:
        return list(places)
    if isinstance(index, slice):
        selected = list(_range(index, n))
        if not selected:
            raise InputError(f"{index!r} selects none of {n} positions.")
        return selected
    numbers = indices(index)
    if not isinstance(numbers, Marked) and any(not -n <= each < n for each in numbers):
        raise InputError(f"No position {numbers}: there are {n}.")
    check_places(numbers, n, "this axis")
    return [places[each] for each in numbers]


def _range(index: slice, n: int) -> range:
    """Return the places that a slice of whole numbers selects of ``n``."""
    if any(each is not None and whole(each) is None for each in (index.start, index.stop, index.step)):
        raise InputError(f"Expected a slice of whole numbers, got {index!r}.")
    try:
        return range(n)[index]
    except (TypeError, ValueError) as error:
        raise InputError(f"Expected a slice of whole numbers, got {index!r}: {error}.") from error


# ------------------------------------------------------------ parts of activations


def index_slices(axes: str, pos: Index | None, heads: Index | None) -> tuple[IndexSlice, ...]:
    """Return what to keep of which axis of an activation with these axes.

    >>> index_slices("batch head query_pos key_pos", slice(0, 1), [2, 3])
    ((2, slice(0, 1, None)), (1, [2, 3]))
    """
    names = axes.split()
    slices: list[IndexSlice] = []
    for index, kinds in ((pos, _POS), (heads, _HEADS)):
        axis = next((names.index(kind) for kind in kinds if kind in names), None)
        if isinstance(index, slice) and _range(index, 1).step < 0:
            raise InputError(f"Expected a slice that goes forward, got {index!r}.")
        if index is not None and axis is not None:
            slices.append((axis, index if isinstance(index, slice) else indices(index)))
    return tuple(slices)


def check_axes(axes: Sequence[str], pos: Index | None, heads: Index | None) -> None:
    """Refuse a choice of positions or heads if no activation has any; those without are kept whole.

    Args:
        axes: those of each activation.

    Raises:
        InputError: with the axes there are.
    """
    for index, kinds, keyword in ((pos, _POS, "pos"), (heads, _HEADS, "heads")):
        if index is not None and axes and not any(kind in each.split() for each in axes for kind in kinds):
            there = " and ".join(f"[{each}]" for each in list(dict.fromkeys(axes))[:3])
            raise InputError(
                f"{keyword}= chooses along the axis {' or '.join(map(repr, kinds))}, and nothing asked for has one: "
                f"it is {there}. Leave {keyword} out, or ask for activations that have it."
            )
