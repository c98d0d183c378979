"""Short forms for people: specs without their defaults, dataclasses with shapes for tensors, tables of hook names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from html import escape
from itertools import groupby
from textwrap import indent
from typing import Any, Self, TypeVar, cast

from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from prisma_core.errors import InputError, SpecError
from prisma_core.errors.arguments import check_flags, expect

V = TypeVar("V")
WIDTH = 100
_LAYER = re.compile(r"(?:(?<=blocks\.)|^)\d+(?=\.)")
_MOST_ITEMS = 16


class BriefModel(BaseModel):
    """A pydantic model that does not change.

    Its repr leaves out defaults and writes equal neighbours once: ``12 * (BlockSpec(...),)``.

    Raises:
        SpecError: values of wrong types, out of range, or that contradict each other.
    """

    def __init__(self, **facts: Any):
        try:
            super().__init__(**facts)
        except ValidationError as error:
            raise SpecError(error) from error

    # pydantic calls an ``__init__`` of one's own for models within models too, and would lose the path to the field
    setattr(__init__, "__pydantic_base_init__", True)  # noqa: B010

    def __setattr__(self, name: str, value: object) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            kind = type(self).__name__
            another = f"{kind}(**{{**dict(it), {name!r}: ...}})"
            raise InputError(f"A {kind} does not change: make another, {another}.") from error

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values, which are checked as those of a new one are.

        Raises:
            SpecError: they do not fit together.
            InputError: ``update`` is no mapping from fields to values.
        """
        check_flags(deep=deep)
        expect(update, (Mapping, type(None)), "other values by field, such as {'d_model': 192}")
        copied = super().model_copy(update=update, deep=deep)
        return type(self)(**vars(copied)) if update else copied

    def _given(self) -> Iterable[tuple[str, str]]:
        for name, field in type(self).model_fields.items():
            if field.is_required() or getattr(self, name) != field.get_default(call_default_factory=True):
                yield name, _code(getattr(self, name))

    def __repr__(self) -> str:
        return _call(type(self).__name__, (f"{name}={value}" for name, value in self._given()))

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, self._given())

    def __str__(self) -> str:
        return repr(self)


class BriefRepr:
    """Base of dataclasses (with ``repr=False``) that hold tensors, models or results, which their repr shows in a line.

    A tensor is its shape, a model its name and size, a long list its length, another long value its first line.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> @dataclass(repr=False)
    ... class Drawn(BriefRepr):
    ...     image: torch.Tensor
    ...     seed: int
    >>> Drawn(torch.zeros(2, 3), 5)
    Drawn(image=float32 [2 3], seed=5)
    """

    def __repr__(self) -> str:
        shown = (each.name for each in fields(cast(Any, self)) if each.repr)
        return _call(type(self).__name__, (f"{name}={_shape(getattr(self, name))}" for name in shown))


class NameTable(dict[str, V]):
    """A dictionary by hook name that shows itself as a table, the layers that are alike in one row."""

    def rows(self) -> list[tuple[str, ...]]:
        """Return names with their axes; of layers that differ in their number alone, one row."""
        return folded((name, str(getattr(value, "axes", value))) for name, value in self.items())

    def __repr__(self) -> str:
        return "\n".join([f"{len(self)} hook points", *aligned(self.rows())])

    def _repr_html_(self) -> str:
        return html_table(f"{len(self)} hook points", self.rows())


def folded(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return rows that begin with a name, those of layers that are alike written once.

    >>> folded([("blocks.0.hook_z", "4"), ("blocks.1.hook_z", "4"), ("hook_embed", "5")])
    [('blocks.{0-1}.hook_z', '4'), ('hook_embed', '5')]
    """
    layers: dict[tuple[str, ...], list[int]] = {}
    for name, *rest in rows:
        match = _LAYER.search(name)
        key = name if match is None else f"{name[: match.start()]}{{}}{name[match.end() :]}"
        layers.setdefault((key, *rest), []).extend([] if match is None else [int(match[0])])
    return [(key.replace("{}", layer_range(of)), *rest) for (key, *rest), of in layers.items()]


def aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return rows as lines, their columns below one another."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def html_table(title: str, rows: Iterable[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """Return rows as an HTML table with a caption, and a head if there is one; everything in it is text."""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(title)}</caption>{top}{body}</table>"


def layer_range(numbers: list[int]) -> str:
    """Return numbers as ranges: ``{0-2,5}``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(numbers) == 1:
        return str(numbers[0])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _call(name: str, arguments: Iterable[str]) -> str:
    given = list(arguments)
    line = f"{name}({', '.join(given)})"
    if len(line) <= WIDTH and "\n" not in line:
        return line
    return f"{name}(\n{indent(''.join(f'{each},' + chr(10) for each in given), '  ')})"


def _code(value: object) -> str:
    """Return a value as code, with equal neighbours of a tuple of specs once."""
    items = cast("tuple[object, ...]", value) if isinstance(value, tuple) else ()
    if not items or not isinstance(items[0], BaseModel):
        return f"{value!r}"
    runs = [(each, len(list(same))) for each, same in groupby(items)]
    return " + ".join(f"{n} * ({each!r},)" if n > 1 else f"({each!r},)" for each, n in runs)


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {str(list(value.shape)).replace(',', '')}"
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return f"{{{', '.join(f'{name!r}: {_shape(each)}' for name, each in items)}}}"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}({value.extra_repr()})"
    parts = cast("list[object]", value) if isinstance(value, list | tuple) else []
    if len(parts) > _MOST_ITEMS:
        return f"{type(parts).__name__} of {len(parts)}"
    if any(isinstance(each, Tensor) for each in parts):
        return f"[{', '.join(map(_shape, parts))}]"
    line, *more = f"{value!r}".splitlines() or [""]
    return f"{line} ..." if more and not isinstance(value, BriefRepr | BriefModel) else f"{value!r}"
