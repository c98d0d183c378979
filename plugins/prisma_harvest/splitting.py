"""Rows as a torch data set whose examples ranks and workers share out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

from prisma_core.plugin import number
from prisma_harvest.manifest import Name


@dataclass
class RowDataset(IterableDataset[Any]):
    """Batches of rows of a harvest: ``DataLoader(harvest.dataset(name, 4096), batch_size=None, num_workers=4)``.

    Every row comes once an epoch over all ranks and workers together. Shares of ranks differ by one example at most, so
    ranks may differ by a batch or two: with ``DistributedDataParallel`` stop at a number of steps, or use its ``join``.

    Attributes:
        rows: ``Harvest.rows`` of the harvest to read.
        name: a hook point, or a list of them.
        batch: rows at once.
        shuffle, buffer, seed, drop_last: see ``Harvest.rows``; the buffer is each worker's own.
        epoch: added to the seed; set it before each epoch. Workers that persist are told of it.
        rank, world: which share this process takes; None asks ``torch.distributed``, where it runs.
    """

    rows: Callable[..., Iterator[Any]]
    name: Name | list[Name]
    batch: int
    shuffle: bool = False
    buffer: int = 2**16
    seed: int = 0
    drop_last: bool = False
    epoch: int = 0
    rank: int | None = None
    world: int | None = None

    def __post_init__(self) -> None:
        self._epoch = torch.tensor(self.epoch).share_memory_()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("epoch", "seed"):
            value = number(value, f"{name}=", -(1 << 63), (1 << 63) - 1)
        if name == "epoch" and "_epoch" in vars(self):
            self._epoch.fill_(value)
        super().__setattr__(name, value)

    def _share(self) -> tuple[int | None, int | None]:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.rank, self.world
        rank = torch.distributed.get_rank() if self.rank is None else self.rank
        return rank, torch.distributed.get_world_size() if self.world is None else self.world

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker that is started anew: no group of processes runs in it."""
        rank, world = self._share()
        return {**vars(self), "rank": rank, "world": world}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._epoch.share_memory_()  # which it is in a worker, and not in a copy

    def __iter__(self) -> Iterator[Any]:
        rank, world = (default if each is None else each for each, default in zip(self._share(), (0, 1), strict=True))
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return self.rows(
            self.name,
            self.batch,
            self.shuffle,
            self.buffer,
            self.seed + int(self._epoch),
            part=(rank * workers + worker, world * workers),
            drop_last=self.drop_last,
        )
