"""What tests send to processes that do not begin as copies: they import it from here, and find no test module."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed
from prisma_harvest import open_harvest
from torch.utils.data import DataLoader

RESID = "blocks.0.hook_resid_post"


class Numbered:
    """Tensors by number, labelled with the process that read them."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 6, 6), float(index), dtype=torch.float64), os.getpid()


def read_share(rank: int, folder: Path, store: Path, how: str | None, workers: int) -> None:
    """Read one rank's rows, in a group of two."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = open_harvest(folder).dataset(RESID, 16, shuffle=True, buffer=64)
    rows = torch.cat(list(DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=how)))
    torch.save(rows, store.with_name(f"rank-{rank}.pt"))
    torch.distributed.destroy_process_group()
