"""The folder of a harvest while it is written: whole shards only, so that whatever stops it can be gone on from."""

from __future__ import annotations

import heapq
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prisma_core import InputError, LoadError
from prisma_core.plugin import check_regular, file_digest, holding, replacing
from prisma_harvest.loading import Batch
from prisma_harvest.manifest import (
    DTYPES,
    EXAMPLES,
    MANIFEST,
    SHARDS,
    SKIPPED,
    WHOLE,
    Manifest,
    ShardFile,
    Whole,
    as_json,
    shard_name,
)

Line = dict[str, Any]
_LINES = "lines"


class Writer:
    """Shards and lines of one harvest.

    A shard's lines are written before its tensors, so a shard that is there is done. Every file is written beside its
    place, synced, and moved into it; one thread does so beside the pass.

    Args:
        folder: the harvest's own.
        manifest: what it holds.
        stream: whether the data begin anew each time, so that what was written is compared as it comes by.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, stream: bool):
        self.folder, self.manifest, self.stream = folder, manifest, stream
        self.hashes: dict[int, str] = {}
        self.recorded: Iterator[Line] = iter(())
        self.whole: Whole | None = None
        self.shard = self.rows = 0
        self.lines: list[Line] = []
        self.buffers: dict[str, Tensor] = {}
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        self.told = set[str]()

    # ---------------------------------------------------------------- the folder

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other writers.

        Raises:
            LoadError: another process holds it, or it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LoadError(f"{self.folder} cannot be made: {error.strerror}.") from error
        with holding(self.folder):
            yield

    def done(self) -> int:
        """Return how many shards are there, from the first on."""
        return next(index for index in count() if not self.shard_path(index).is_file())

    def prepare(self) -> None:
        """Make the folder ready to go on."""
        self.tidy()
        self.shard, self.whole = self.done(), Whole.read(self.folder)
        if self.stream:
            self.recorded = self._written()
        if not (self.folder / MANIFEST).is_file():
            _write(self.folder / MANIFEST, [self.manifest.text()])

    def tidy(self) -> None:
        """Remove what killed writers left."""
        for remains in self.folder.rglob(".prisma-writing-*"):
            shutil.rmtree(remains, ignore_errors=True)
        if Whole.read(self.folder) is not None:
            shutil.rmtree(self.folder / _LINES, ignore_errors=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown(wait=True)

    # ---------------------------------------------------------------- batches

    def add(self, batch: Batch, activations: dict[str, Tensor]) -> None:
        """Take a batch; a shard that is full is written beside the pass.

        Raises:
            LoadError: the disk refused an earlier shard, or a stream is not the one that was begun.
            InputError: activations differ in shape from those of the first image, or do not fit float16.
        """
        if batch.start < self.shard * self.manifest.shard:
            self._compare(batch)
            return
        if self.whole is not None:
            raise self._another(batch.start)
        self.lines += sorted(batch.lines + batch.skipped, key=_position)
        n = len(batch.lines)
        for point in self.manifest.points if n else ():
            x = activations[point.name]
            if x.shape != (n, *point.shape):
                raise InputError(
                    f"{point.name} is {list(x.shape)} for images {batch.start} to {batch.start + batch.size - 1}; "
                    f"expected {[n, *point.shape]}, as for the first image."
                )
            if point.name not in self.buffers:
                self.buffers[point.name] = self._buffer(self.manifest.shard, point.shape)
            self.buffers[point.name][self.rows : self.rows + n].copy_(x)
        self.rows += n
        if batch.start + batch.size == (self.shard + 1) * self.manifest.shard:
            self._commit()

    def finish(self) -> None:
        """Write what is left, and the record of the whole.

        Raises:
            LoadError: the disk refused, or a stream ended earlier than the one that was begun.
            InputError: no image could be read.
        """
        if (line := next(self.recorded, None)) is not None:
            raise self._another(line["source"])
        if self.whole is not None:
            return
        self.flush()
        counts = self._join_lines()
        if not sum(counts):
            raise InputError("Not one image could be read: there is nothing to harvest.")
        paths = [self.shard_path(index) for index in range(self.shard)]
        hashes = [self.hashes.get(index) or file_digest(path) for index, path in enumerate(paths)]
        rows = zip(paths, hashes, counts, strict=True)
        whole = Whole(
            examples=sum(counts),
            skipped=sum(1 for _ in read_lines(self.folder / SKIPPED)),
            shards={path.name: ShardFile(sha256=sha256, examples=n) for path, sha256, n in rows},
            lines={name: file_digest(self.folder / name) for name in (EXAMPLES, SKIPPED)},
        )
        _write(self.folder / WHOLE, [as_json(whole.model_dump(mode="json"))])
        self.tidy()

    def flush(self) -> None:
        """Write the shard that was begun, and wait until it is on disk.

        Raises:
            LoadError: the disk refused.
        """
        if self.lines:
            self._commit()
        self._wait()

    # ---------------------------------------------------------------- files

    def shard_path(self, index: int) -> Path:
        return self.folder / SHARDS / shard_name(index)

    def _lines_path(self, index: int) -> Path:
        return self.folder / _LINES / f"{index:05d}.jsonl"

    def _buffer(self, n: int, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(n, *shape, dtype=DTYPES[self.manifest.dtype])

    def _commit(self) -> None:
        self._wait()
        tensors = {
            point.name: self.buffers[point.name][: self.rows] if self.rows else self._buffer(0, point.shape)
            for point in self.manifest.points
        }
        for name, x in tensors.items():
            if not torch.isfinite(x).all():
                self._not_finite(name, x)
        self.pending = self.thread.submit(self._save, self.shard, tensors, self.lines)
        self.shard, self.rows, self.lines, self.buffers = self.shard + 1, 0, [], {}

    def _not_finite(self, name: str, x: Tensor) -> None:
        """Refuse what float16 cannot hold, and tell of others once a hook point: nothing can be trained on them."""
        if self.manifest.dtype == "float16" and torch.isinf(x).any():
            raise InputError(f"{name} holds values too large for float16: use dtype='bfloat16'.")
        rows = (torch.isnan(x) | (x == torch.inf)).flatten(1).any(1)  # masked scores are -inf
        if rows.any() and name not in self.told:
            self.told.add(name)
            line = [line for line in self.lines if "error" not in line][int(rows.nonzero()[0])]
            of = f"image {line['source']} ({line.get('path') or 'without a path'})"
            warnings.warn(
                f"{name} is NaN or infinite for {of}, and perhaps for others: it is written as it is.", stacklevel=2
            )

    def _save(self, shard: int, tensors: dict[str, Tensor], lines: list[Line]) -> None:
        _write(self._lines_path(shard), map(_text, lines))
        path = self.shard_path(shard)
        with replacing(path) as beside:
            save_file(tensors, beside)
        self.hashes[shard] = file_digest(path)

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def _join_lines(self) -> list[int]:
        """Write the lines of all shards to one file, those that were skipped to another; count examples by shard."""
        counts = [0] * self.shard

        def examples() -> Iterator[str]:
            numbers = count()
            for shard in range(self.shard):
                for line in read_lines(self._lines_path(shard)):
                    if "error" not in line:
                        counts[shard] += 1
                        yield _text({"example": next(numbers), **line})

        def skipped() -> Iterator[str]:
            lines = (line for shard in range(self.shard) for line in read_lines(self._lines_path(shard)))
            return (_text(line) for line in lines if "error" in line)

        _write(self.folder / EXAMPLES, examples())
        _write(self.folder / SKIPPED, skipped())
        return counts

    # ---------------------------------------------------------------- a stream that is read again

    def _written(self) -> Iterator[Line]:
        """Yield the lines of what is done, skipped or not, by their position in the data."""
        if self.whole is not None:
            files = [read_lines(self.folder / name) for name in (EXAMPLES, SKIPPED)]
            return heapq.merge(*files, key=_position)
        return (line for shard in range(self.shard) for line in read_lines(self._lines_path(shard)))

    def _compare(self, batch: Batch) -> None:
        """Compare a batch of a stream with what was written of it."""
        for line in sorted(batch.lines + batch.skipped, key=_position):
            before = next(self.recorded, None)
            if before is None or any(line.get(key) != before.get(key) for key in ("source", "sha256", "label")):
                raise self._another(line["source"])

    def _another(self, position: int) -> LoadError:
        return LoadError(
            f"{self.folder} is of another stream, which begins like this one and differs at position {position}. Give "
            "each a data_name= of its own, or remove the folder."
        )


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file of JSON lines.

    Raises:
        LoadError: it is missing or damaged.
    """
    check_regular(path)
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            for text in file:
                yield json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read: {error}. Remove the folder and harvest again.") from error


def _position(line: Line) -> int:
    return line["source"]


def _text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n"


def _write(path: Path, texts: Iterable[str]) -> None:
    with replacing(path) as beside, beside.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(texts)
