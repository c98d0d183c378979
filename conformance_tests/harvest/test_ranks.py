"""Rows of a harvest in a group of processes of ``torch.distributed``: no two ranks and workers read the same."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from prisma_harvest import Harvest, harvest, open_harvest
from prisma_harvest.splitting import RowDataset
from torch.utils.data import DataLoader

from prisma_core import HookedViT

RESID = "blocks.0.hook_resid_post"


@pytest.fixture
def acts(model: HookedViT, tmp_path: Path) -> Harvest:
    """53 images in shards of 20."""
    images = torch.randn(53, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how: dict[str, Any] = {"preprocess": None, "batch": 10, "shard": 20, "workers": 0}
    return harvest(model, list(images), [RESID], out=tmp_path / "acts", **how)


def read(rank: int, folder: Path, store: Path, how: str | None, workers: int) -> None:
    """Read one rank's rows, in a group of two."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = open_harvest(folder).dataset(RESID, 16, shuffle=True, buffer=64)
    rows = torch.cat(list(DataLoader(data, batch_size=None, num_workers=workers, multiprocessing_context=how)))
    torch.save(rows, store.with_name(f"rank-{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("how", "workers"), [(None, 0), ("fork", 2), ("spawn", 2)])
def test_a_group_of_processes(acts: Harvest, tmp_path: Path, how: str | None, workers: int) -> None:
    """Workers that are spawned know of no group: the data set tells them."""
    torch.multiprocessing.spawn(read, (acts.path, tmp_path / "store", how, workers), nprocs=2)
    shares = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    everything = torch.cat(list(acts.rows(RESID, 64)))
    assert sorted(map(tuple, torch.cat(shares).tolist())) == sorted(map(tuple, everything.tolist()))
    assert abs(len(shares[0]) - len(shares[1])) <= 10 * max(1, workers)


def test_outside_of_a_group_a_copy_waits_for_one(acts: Harvest) -> None:
    copy = pickle.loads(pickle.dumps(acts.dataset(RESID, 16)))
    assert isinstance(copy, RowDataset)
    assert (copy.rank, copy.world) == (None, None)
    assert torch.equal(torch.cat(list(copy)), torch.cat(list(acts.rows(RESID, 16))))
