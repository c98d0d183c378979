"""Rows as a torch data set whose examples ranks and workers share out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset, get_worker_info

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
        epoch: added to the seed; set it before each epoch.
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

    def __iter__(self) -> Iterator[Any]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = self.rank if self.rank is not None else torch.distributed.get_rank() if distributed else 0
        world = self.world if self.world is not None else torch.distributed.get_world_size() if distributed else 1
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return self.rows(
            self.name,
            self.batch,
            self.shuffle,
            self.buffer,
            self.seed + self.epoch,
            part=(rank * workers + worker, world * workers),
            drop_last=self.drop_last,
        )
