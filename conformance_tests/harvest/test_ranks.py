"""Rows of a harvest in a group of processes of ``torch.distributed``: no two ranks and workers read the same."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from prisma_harvest import Harvest, harvest
from prisma_harvest.splitting import RowDataset
from sent import RESID, read_share
from torch.utils.data import DataLoader

from prisma_core import HookedViT


@pytest.fixture
def acts(model: HookedViT, tmp_path: Path) -> Harvest:
    """53 images in shards of 20."""
    images = torch.randn(53, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how: dict[str, Any] = {"preprocess": None, "batch": 10, "shard": 20, "workers": 0}
    return harvest(model, list(images), [RESID], out=tmp_path / "acts", **how)


@pytest.mark.parametrize(("how", "workers"), [(None, 0), ("fork", 2), ("spawn", 2)])
def test_a_group_of_processes(acts: Harvest, tmp_path: Path, how: str | None, workers: int) -> None:
    """Workers that are spawned know of no group: the data set tells them."""
    torch.multiprocessing.spawn(read_share, (acts.path, tmp_path / "store", how, workers), nprocs=2)
    shares = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2)]
    everything = torch.cat(list(acts.rows(RESID, 64)))
    assert sorted(map(tuple, torch.cat(shares).tolist())) == sorted(map(tuple, everything.tolist()))
    assert abs(len(shares[0]) - len(shares[1])) <= 10 * max(1, workers)


def test_outside_of_a_group_a_copy_waits_for_one(acts: Harvest) -> None:
    other = pickle.loads(pickle.dumps(acts.dataset(RESID, 16)))
    assert isinstance(other, RowDataset)
    assert (other.rank, other.world) == (None, None)
    assert torch.equal(torch.cat(list(other)), torch.cat(list(acts.rows(RESID, 16))))


@pytest.mark.parametrize("how", ["fork", "spawn", "forkserver"])
def test_workers_that_persist_are_told_of_the_epoch(acts: Harvest, how: str) -> None:
    data = acts.dataset(RESID, 16, shuffle=True, buffer=64)
    copies = [data, copy.deepcopy(data), pickle.loads(pickle.dumps(data))]
    for each in copies[: 3 if how == "fork" else 1]:
        loader = DataLoader(
            each, batch_size=None, num_workers=1, multiprocessing_context=how, persistent_workers=True
        )  # of one, so that the order is that of one process
        for epoch in (0, 3, 1):
            each.epoch = epoch
            alone = acts.dataset(RESID, 16, shuffle=True, buffer=64, epoch=epoch)
            assert torch.equal(torch.cat(list(loader)), torch.cat(list(alone))), epoch
