"""The result of a technique: a tensor with names for its axes and labels along them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from prisma_core.errors import InputError, LoadError, PluginError, PrismaError, UnknownName, printable, suggest
from prisma_core.errors.arguments import check_flags, expect, number, path_of, several, shown, tensor, whole
from prisma_core.files.checkpoint import read_with_header, write_safetensors
from prisma_core.files.texts import parse_json
from prisma_core.spec.brief import html_table
from prisma_core.toolbox.precision import widened

Self_ = TypeVar("Self_", bound="Result")
Label = int | str
_METADATA = "prisma_result"
_SHOWN = 10


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a technique: values with named axes and labels.

    >>> heat = Result(torch.eye(2), ("layer", "head"), {"layer": ("0", "1")}, technique="patch", unit="logits")
    >>> heat.sel(layer=1).top(1)
    [(('1',), 1.0)]

    Attributes:
        values: the numbers, without a graph.
        axes: the name of each axis, such as ``layer head batch``.
        labels: by axis, a label for each index; an axis without labels is counted.
        technique: the function that made it.
        unit: what one number is: ``logits``, ``share of attention``, ``change of the metric``.
        baseline: what the numbers are held against, in words.
        total: what they sum to, in words.
        tensors: further tensors that belong to the values, by name, such as a ``constant``.
        facts: anything else worth keeping, as JSON: a reference, a layer, a seed.
    """

    values: Tensor
    axes: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    technique: str = ""
    unit: str = ""
    baseline: str = ""
    total: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        tensor(self.values, "the values of a result")
        expect(self.axes, (tuple, list), "the names of the axes, a tuple")
        for name in ("labels", "tensors", "facts"):
            expect(getattr(self, name), Mapping, f"{name} by name")
        for text in (*self.axes, self.technique, self.unit, self.baseline, self.total):
            expect(text, str, "axes, technique, unit, baseline and total in words")
        if len(self.axes) != self.values.ndim or len(set(self.axes)) != len(self.axes):
            raise InputError(f"Expected a name for each axis of {list(self.values.shape)}, got {shown(self.axes)}.")
        for axis, size in zip(self.axes, self.values.shape, strict=True):
            if axis not in self.labels:
                continue
            expect(self.labels[axis], (tuple, list), f"labels of {axis!r}, a tuple")
            for label in self.labels[axis]:
                expect(label, str, f"labels of {axis!r} in words")
            if len(self.labels[axis]) != size:
                raise InputError(f"The axis {axis!r} has {size} places and {len(self.labels[axis])} labels.")
        object.__setattr__(self, "values", self.values.detach())
        object.__setattr__(self, "tensors", {name: tensor.detach() for name, tensor in self.tensors.items()})

    @property
    def shape(self) -> dict[str, int]:
        """The length of each axis."""
        return dict(zip(self.axes, self.values.shape, strict=True))

    def names(self, axis: str) -> tuple[str, ...]:
        """Return the labels along an axis, its numbers where it has none.

        Raises:
            UnknownName: there is no such axis.
        """
        n = self.values.shape[self._axis(axis)]
        return self.labels.get(axis) or tuple(map(str, range(n)))

    def sel(self: Self_, **places: Label | Sequence[Label]) -> Self_:
        """Return the part at some places, by axis: an index, a label (the axis goes), or several (the axis stays).

        >>> Result(torch.eye(3), ("layer", "class"), {"class": ("cat", "dog", "cow")}).sel(**{"class": "dog"}).values
        tensor([0., 1., 0.])

        Raises:
            UnknownName: no such axis or label; the nearest are suggested.
        """
        part = self
        for axis, where in places.items():
            at = part._axis(axis)
            if isinstance(where, str) or whole(where) is not None:
                labels = {name: each for name, each in part.labels.items() if name != axis}
                values = part.values.select(at, part.index(axis, cast(Label, where)))
                part = replace(part, values=values, axes=part.axes[:at] + part.axes[at + 1 :], labels=labels)
                continue
            chosen = several(where, f"an index or label of {axis!r}, or several")
            indices = [part.index(axis, each) for each in chosen]
            names = part.names(axis)
            labels = {**part.labels, axis: tuple(names[each] for each in indices)}
            values = part.values.index_select(at, torch.tensor(indices, device=part.values.device))
            part = replace(part, values=values, labels=labels)
        return part

    def index(self, axis: str, where: Label) -> int:
        """Return the place of a label on an axis; negative indices count from the end.

        Raises:
            UnknownName: there is none.
        """
        names, n = self.names(axis), self.values.shape[self._axis(axis)]
        if not isinstance(where, str):
            place = number(where, f"an index or label of {axis!r}")
            if not -n <= place < n:
                raise UnknownName(f"No {axis} {where}: they run from 0 to {n - 1}.")
            return place % n
        if where not in names:
            raise UnknownName(f"No {axis} {where!r}.{suggest(where, names)}")
        return names.index(where)

    def top(self, k: int = 10, *, by_size: bool = True) -> list[tuple[tuple[str, ...], float]]:
        """Return the ``k`` largest values with the labels of their places.

        >>> Result(torch.tensor([1., -3.]), ("class",), {"class": ("cat", "dog")}).top(1)
        [(('dog',), -3.0)]

        Args:
            by_size: the largest by absolute value; False the largest by value.
        """
        check_flags(by_size=by_size)
        flat = self.values.flatten().cpu().double()
        order = (flat.abs() if by_size else flat).topk(min(number(k, "how many", 1), flat.numel())).indices
        names = [self.names(axis) for axis in self.axes]
        places = torch.stack(torch.unravel_index(order, self.values.shape), -1) if self.axes else order[:, None][:, :0]
        rows = zip(cast("list[list[int]]", places.tolist()), cast("list[float]", flat[order].tolist()), strict=True)
        return [(tuple(each[i] for each, i in zip(names, place, strict=True)), value) for place, value in rows]

    # ---------------------------------------------------------------- other forms

    def to_dataframe(self) -> Any:
        """Return a pandas table with a row for each value: a column an axis, and ``value``.

        Raises:
            PluginError: pandas is not installed.
        """
        pandas = _library("pandas")
        values = widened(self.values).flatten().cpu().numpy()
        if not self.axes:
            return pandas.DataFrame({"value": values})
        index = pandas.MultiIndex.from_product([self.names(axis) for axis in self.axes], names=list(self.axes))
        return pandas.DataFrame({"value": values}, index=index).reset_index()

    def to_xarray(self) -> Any:
        """Return an xarray array with the same axes and labels.

        Raises:
            PluginError: xarray is not installed.
        """
        labels = {axis: list(self.names(axis)) for axis in self.axes if axis in self.labels}
        about = {"technique": self.technique, "unit": self.unit, "baseline": self.baseline, "total": self.total}
        return _library("xarray").DataArray(
            widened(self.values).cpu().numpy(), dims=self.axes, coords=labels, attrs=about
        )

    def plot(self, **options: Any) -> Any:
        """Return a Plotly figure that fits the values; ``.save("figure.pdf")`` writes it (see ``prisma_view.plot``).

        Raises:
            PluginError: the library that draws is not installed.
            InputError: there is nothing to draw, or no axis that an option needs.
        """
        return _library("prisma_view", "view").plot(self, **options)

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file; ``Result.load`` reads it.

        Raises:
            InputError: the path does not end in ``.safetensors``.
            LoadError: the disk is full, read-only, or refuses in another way; a file that was there is as it was.
        """
        about = {name: getattr(self, name) for name in ("axes", "labels", "technique", "unit", "baseline", "total")}
        tensors = {"values": self.values} | {f"tensors/{name}": tensor for name, tensor in self.tensors.items()}
        header = json.dumps({**about, "labels": dict(self.labels), "facts": dict(self.facts)})
        return write_safetensors(path, tensors, {_METADATA: header})

    @classmethod
    def load(cls: type[Self_], path: str | Path) -> Self_:
        """Read what ``save`` wrote.

        Raises:
            LoadError: the file is truncated, corrupt, or no result.
        """
        path = path_of(path)
        tensors, header = read_with_header(path, _METADATA)
        try:
            about = parse_json(header or "", path)
            labels = {axis: tuple(names) for axis, names in about.pop("labels").items()}
            more = {name.removeprefix("tensors/"): each for name, each in tensors.items() if name != "values"}
            return cls(tensors["values"], tuple(about.pop("axes")), labels, tensors=more, **about)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LoadError(f"{path} holds no result: expected a file written by Result.save.") from error

    # ---------------------------------------------------------------- to look at

    def __repr__(self) -> str:
        head = f"{type(self).__name__}({', '.join(f'{axis} {size}' for axis, size in self.shape.items())})"
        about = ", ".join(each for each in (self.technique, self.unit, self.baseline) if each)
        rows = [f"  {' '.join(place) or 'value'}: {value:+.4g}" for place, value in self.top(_SHOWN)]
        more = self.values.numel() - len(rows)
        lines = [f"{head}{f': {about}' if about else ''}", *rows, *([f"  ... {more} more"] if more else [])]
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        try:
            figure = cast(str, self.plot().notebook_html())
        except PrismaError:  # nothing that draws is installed, or there is nothing to draw
            return self._table()
        return f"{figure}<details><summary>Largest values</summary>{self._table()}</details>"

    def _table(self) -> str:
        rows = [(*place, f"{value:+.4g}") for place, value in self.top(_SHOWN)]
        caption = ", ".join(f"{axis} {size}" for axis, size in self.shape.items())
        title = f"{self.technique or type(self).__name__} ({caption}), largest first"
        return html_table(title, rows, (*self.axes, self.unit or "value"))

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(f"A {type(self).__name__} is no sequence: take .values, .sel(...) or .top(k).")

    def _axis(self, axis: str) -> int:
        if expect(axis, str, "the name of an axis") not in self.axes:
            raise UnknownName(f"No axis {axis!r}; there are {', '.join(self.axes)}.{suggest(axis, self.axes)}")
        return self.axes.index(axis)


def _library(name: str, extra: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        install = f"pip install 'prisma-interp[{extra}]'" if extra else f"pip install {name}"
        raise PluginError(f"This needs {name}, which is not installed: {install}") from error
