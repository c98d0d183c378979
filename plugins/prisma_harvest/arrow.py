"""A harvest as Arrow, for DuckDB, Polars, pandas, ``datasets`` and Parquet files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from prisma_core import PluginError
from prisma_harvest.folder import Line
from prisma_harvest.manifest import Point


def record_batches(
    points: Sequence[Point], dtype: str, lines: Iterator[Line], read: Callable[[str, int, int], Tensor], batch: int
) -> Any:
    """Return a ``pyarrow.RecordBatchReader``: a row an example, a column a hook point, all its numbers in one list.

    Columns: ``example``, ``source``, ``path``, ``label`` (as text), ``sha256``, then the hook points as lists of a
    fixed length, in C order; their axes and shape are in the field's metadata. bfloat16, which Arrow lacks, becomes
    float32, which holds the same numbers.

    Args:
        points: the hook points.
        dtype: of the harvest.
        lines: what is known of each example, in order.
        read: from a hook point's name, the first example and the one behind the last to ``[example ...]``.
        batch: examples at once.

    Raises:
        PluginError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise PluginError("Arrow needs pyarrow, which is not installed: pip install pyarrow") from error
    half = dtype == "float16"
    number = pyarrow.float16() if half else pyarrow.float32()
    fields = [("example", pyarrow.int64()), ("source", pyarrow.int64())]
    fields += [(name, pyarrow.string()) for name in ("path", "label", "sha256")]
    schema = pyarrow.schema(
        [pyarrow.field(*each) for each in fields] + [_field(pyarrow, point, number) for point in points]
    )

    def batches() -> Iterator[Any]:
        start = 0
        while group := list(islice(lines, batch)):
            columns = [[line[name] for line in group] for name in ("example", "source", "path", "label", "sha256")]
            columns[2], columns[3] = (list(map(_text, column)) for column in columns[2:4])
            arrays = [pyarrow.array(column, type=kind) for column, (_, kind) in zip(columns, fields, strict=True)]
            for point in points:
                x = read(point.name, start, start + len(group)).flatten(1)
                flat = x.to(torch.float16 if half else torch.float32).flatten().numpy()
                arrays.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), x.shape[1]))
            yield pyarrow.record_batch(arrays, schema=schema)
            start += len(group)

    return pyarrow.RecordBatchReader.from_batches(schema, batches())


def _text(value: Any) -> str | None:
    """Return a path or a label as text that Arrow holds: bytes of a name that are not UTF-8 as the sign for those."""
    return None if value is None else str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _field(pyarrow: Any, point: Point, number: Any) -> Any:
    size = torch.Size(point.shape).numel()
    metadata = {"axes": point.axes, "shape": json.dumps(list(point.shape))}
    return pyarrow.field(point.name, pyarrow.list_(number, size), metadata=metadata)
