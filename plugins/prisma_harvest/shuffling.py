"""Rows in batches, in order or through a bounded buffer, from runs that are read in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prisma_harvest.runs import Run

BLOCK_BYTES = 2**19  # half of what a core's second-level cache holds: a block is taken while it is there
Rows = tuple[Tensor, ...]


class Chunk(NamedTuple):
    """Consecutive examples of a shard, counted from its start."""

    shard: int
    start: int
    stop: int


def cut(sizes: Sequence[int], size: int) -> list[Chunk]:
    """Cut shards into chunks of at most ``size`` examples.

    >>> cut([3, 2], 2)
    [Chunk(shard=0, start=0, stop=2), Chunk(shard=0, start=2, stop=3), Chunk(shard=1, start=0, stop=2)]
    """
    return [Chunk(shard, start, min(start + size, n)) for shard, n in enumerate(sizes) for start in range(0, n, size)]


def dealt(chunks: Sequence[Chunk], part: int, parts: int) -> list[Chunk]:
    """Return a share of a sequence of chunks, of which one may be cut: shares differ by one example at most.

    >>> dealt([Chunk(0, 0, 3), Chunk(1, 0, 3)], 0, 4)
    [Chunk(shard=0, start=0, stop=1)]
    """
    n = sum(chunk.stop - chunk.start for chunk in chunks)
    first, last = part * n // parts, (part + 1) * n // parts
    share, at = list[Chunk](), 0
    for chunk in chunks:
        start, stop = max(chunk.start, chunk.start + first - at), min(chunk.stop, chunk.start + last - at)
        if start < stop:
            share.append(Chunk(chunk.shard, start, stop))
        at += chunk.stop - chunk.start
    return share


def buffered(runs: Iterable[Rows], batch: int) -> Iterator[Rows]:
    """Yield rows in order, ``batch`` at a time; the last batch may be shorter."""
    held, n = list[Rows](), 0
    for run in runs:
        held.append(run)
        n += len(run[0])
        if n < batch:
            continue
        rows, whole = _joined(held), n // batch * batch
        held, n = [tuple(each[whole:] for each in rows)], n - whole
        for start in range(0, whole, batch):
            yield tuple(each[start : start + batch] for each in rows)
        del rows
    if n:
        yield _joined(held)


def shuffled(runs: Sequence[Run], batch: int, places: Rows, seed: int) -> Iterator[Rows]:
    """Yield rows in random order out of a buffer. While it is given out, the system reads on the disk what comes next.

    A second buffer that a thread fills meanwhile would be slower: two together do not stay in a processor's cache.

    Args:
        places: the buffer, ``[row d]`` for each hook point; whatever it holds is overwritten.
    """
    generator = torch.Generator().manual_seed(seed)
    for rows in _filled(runs, places):
        yield from drawn(rows, batch, generator)


def _filled(runs: Sequence[Run], buffer: Rows) -> Iterator[Rows]:
    """Yield the buffer each time it is full of the rows of runs, in order; the last time as far as it is."""
    n = 0
    for index, run in enumerate(runs):
        at = run.start
        while at < run.stop:
            taken = min(run.stop - at, len(buffer[0]) - n)
            run.shard.read(at, [place[n : n + taken] for place in buffer])
            at, n = at + taken, n + taken
            if n == len(buffer[0]):
                _announce(runs[index:], buffer)
                yield buffer
                n = 0
    if n:
        yield tuple(place[:n] for place in buffer)


def _announce(runs: Sequence[Run], buffer: Rows) -> None:
    """Tell the system which runs the buffer is filled with next."""
    n = 0
    for run in runs:
        run.shard.announce(run.start, run.stop, buffer)
        n += run.stop - run.start
        if n >= len(buffer[0]):
            return


def drawn(places: Rows, batch: int, generator: torch.Generator) -> Iterator[Rows]:
    """Yield all rows in random order: gathered a block of batches at a time, for small tensors are slow to allocate."""
    order = torch.randperm(len(places[0]), generator=generator)
    size = places[0][:1].nbytes * batch
    for part in order.split(batch * max(1, BLOCK_BYTES // max(1, size))):
        block = tuple(place.index_select(0, part) for place in places)
        for start in range(0, len(part), batch):
            yield tuple(each[start : start + batch] for each in block)


def _joined(parts: list[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(each) for each in zip(*parts, strict=True))
