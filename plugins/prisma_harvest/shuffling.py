"""Rows in batches, in order or through a bounded buffer, from runs that are read in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

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


def shuffled(runs: Iterable[Rows], batch: int, buffer: int, seed: int) -> Iterator[Rows]:
    """Yield rows in random order out of a buffer, which is filled anew from the runs when it is empty."""
    generator = torch.Generator().manual_seed(seed)
    for rows in buffered(runs, max(1, buffer // batch) * batch):
        order = torch.randperm(len(rows[0]), generator=generator)
        yield from (tuple(each.index_select(0, drawn) for each in rows) for drawn in order.split(batch))


def _joined(parts: list[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else tuple(torch.cat(each) for each in zip(*parts, strict=True))
