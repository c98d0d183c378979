"""A harvest as Arrow, for DuckDB, Polars, pandas, ``datasets`` and Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from prisma_core import PluginError
from prisma_harvest.manifest import Point
from prisma_harvest.reading import Harvest, Name


def reader(harvest: Harvest, names: Name | list[Name] | None = None, batch: int = 64) -> Any:
    """Return a ``pyarrow.RecordBatchReader``: a row an example, a column a hook point, all its numbers in one list.

    Columns: ``example``, ``source``, ``path``, ``label`` (as text), ``sha256``, then the hook points as lists of a
    fixed length, in C order; their axes and shape are in the field's metadata. bfloat16, which Arrow lacks, becomes
    float32, which holds the same numbers.

    Raises:
        PluginError: pyarrow is not installed.
        UnknownName: no such hook point.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise PluginError("Arrow needs pyarrow, which is not installed: pip install pyarrow") from error
    asked = harvest.names if names is None else names if isinstance(names, list) else [names]
    points = [harvest.point(name) for name in asked]
    half = harvest.manifest.dtype == "float16"
    number = pyarrow.float16() if half else pyarrow.float32()
    fields = [("example", pyarrow.int64()), ("source", pyarrow.int64())]
    fields += [(name, pyarrow.string()) for name in ("path", "label", "sha256")]
    schema = pyarrow.schema(
        [pyarrow.field(*each) for each in fields] + [_field(pyarrow, point, number) for point in points]
    )

    def batches() -> Iterator[Any]:
        lines = harvest.examples()
        for start in range(0, len(harvest), batch):
            group = list(islice(lines, batch))
            columns = [[line[name] for line in group] for name in ("example", "source", "path", "label", "sha256")]
            columns[3] = [None if label is None else str(label) for label in columns[3]]
            arrays = [pyarrow.array(column, type=kind) for column, (_, kind) in zip(columns, fields, strict=True)]
            for point in points:
                x = harvest.read(point.name, start, start + len(group)).flatten(1)
                flat = x.to(torch.float16 if half else torch.float32).flatten().numpy()
                arrays.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), x.shape[1]))
            yield pyarrow.record_batch(arrays, schema=schema)

    return pyarrow.RecordBatchReader.from_batches(schema, batches())


def _field(pyarrow: Any, point: Point, number: Any) -> Any:
    size = torch.Size(point.shape).numel()
    metadata = {"axes": point.axes, "shape": json.dumps(list(point.shape))}
    return pyarrow.field(point.name, pyarrow.list_(number, size), metadata=metadata)
