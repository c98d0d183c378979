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
    rest: Rows | None = None
    for run in runs:
        rows = run if rest is None else tuple(torch.cat(pair) for pair in zip(rest, run, strict=True))
        whole = len(rows[0]) // batch * batch
        for start in range(0, whole, batch):
            yield tuple(each[start : start + batch] for each in rows)
        rest = tuple(each[whole:] for each in rows)
    if rest is not None and len(rest[0]):
        yield rest


def shuffled(runs: Iterable[Rows], batch: int, buffer: int, seed: int) -> Iterator[Rows]:
    """Yield rows drawn at random from a buffer, which is filled up from the runs.

    A batch takes the rows of random places of the buffer and leaves the next rows in them. Within one round of the
    buffer each place is drawn once.
    """
    generator = torch.Generator().manual_seed(seed)
    buffer = max(buffer, batch)
    held, fresh = list[Rows](), buffered(runs, batch)
    n = 0
    for group in fresh:
        held.append(group)
        n += len(group[0])
        if n >= buffer:
            break
    if not held:
        return
    places = tuple(torch.cat(each) for each in zip(*held, strict=True))
    held.clear()
    order = torch.randperm(n, generator=generator)
    at = 0
    for group in fresh:
        size = len(group[0])
        if at + size > n:
            order, at = torch.randperm(n, generator=generator), 0
        drawn = order[at : at + size]
        yield tuple(each.index_select(0, drawn) for each in places)
        for each, rows in zip(places, group, strict=True):
            each.index_copy_(0, drawn, rows)
        at += size
    order = torch.randperm(n, generator=generator)
    yield from (tuple(each.index_select(0, drawn) for each in places) for drawn in order.split(batch))
