"""Runs of consecutive examples, read from shards straight into buffers: one sequential read each, no copy."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prisma_core import LoadError
from prisma_core.plugin import check_regular
from prisma_harvest.manifest import DTYPES, Dtype, Point, tensor_bytes

_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # in the header of safetensors


def _will_need(file: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)


@dataclass
class ShardReader:
    """Rows of some hook points in one shard.

    Attributes:
        path: the file.
        n: how many examples it holds.
        points: the hook points.
        dtype: of the tensors.
    """

    path: Path
    n: int
    points: Sequence[Point]
    dtype: Dtype
    starts: list[int] = field(default_factory=list[int], init=False)

    def read(self, start: int, places: Sequence[Tensor]) -> None:
        """Read consecutive rows ``[row d]`` of each hook point, as many as a place holds, from row ``start`` on.

        Raises:
            LoadError: the file is missing or damaged.
        """
        check_regular(self.path)
        try:
            with self.path.open("rb", buffering=0) as file:
                self.starts = self.starts or self._starts(file)
                for first, place in zip(self.starts, places, strict=True):
                    memory = tensor_bytes(place)
                    file.seek(first + start * place[0].numel() * place.element_size())
                    at = 0
                    while at < len(memory):
                        read = file.readinto(memory[at:])
                        if not read:
                            raise EOFError("it is cut off")
                        at += read
        except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
            raise LoadError(f"{self.path} cannot be read: {error}. `prisma harvest verify` tells what is.") from error

    def announce(self, start: int, stop: int, places: Sequence[Tensor]) -> None:
        """Tell the system that rows will be read. What is wrong with the file is told by ``read``."""
        with suppress(LoadError, OSError, ValueError, KeyError, TypeError, RecursionError):
            check_regular(self.path)
            with self.path.open("rb", 0) as file:
                self.starts = self.starts or self._starts(file)
                for first, place in zip(self.starts, places, strict=True):
                    row = place[0].nbytes
                    _will_need(file.fileno(), first + start * row, (stop - start) * row)

    def _starts(self, file: FileIO) -> list[int]:
        """Return where the tensors begin.

        Raises:
            ValueError: they are not what the manifest says.
        """
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= 2**27:
            raise ValueError("its header is damaged")
        header = json.loads(file.read(length))
        starts: list[int] = []
        for point in self.points:
            one = header[point.name]
            if one["shape"] != [self.n, *point.shape] or one["dtype"] != _NAMES[self.dtype]:
                raise ValueError(f"it holds {one['shape']} {one['dtype']} where its manifest says otherwise")
            starts.append(8 + length + one["data_offsets"][0])
        return starts


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a shard.

    Attributes:
        shard: the shard.
        start, stop: the first row, and the one behind the last.
    """

    shard: ShardReader
    start: int
    stop: int


def buffers(points: Sequence[Point], dtype: Dtype, rows: int, per: int) -> tuple[Tensor, ...]:
    """Return empty tensors ``[rows d]`` for hook points with ``per`` rows an example.

    numpy asks the system for huge pages, which torch does not: random reads of rows then find their pages faster.
    """
    widths = (torch.Size(point.shape).numel() // per for point in points)
    sizes = (rows * width * DTYPES[dtype].itemsize for width in widths)
    return tuple(torch.from_numpy(np.empty(size, np.uint8)).view(DTYPES[dtype]).view(rows, -1) for size in sizes)
