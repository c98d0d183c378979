"""Processes that do not begin as copies, and streams that share themselves out: the same examples, none lost."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from photo_data import tar
from prisma_harvest import Pass, harvest, open_data
from sent import Numbered
from torch.utils.data import IterableDataset, get_worker_info

from prisma_core import HookedViT, InputError

NAME = ("resid_post", 1)


@pytest.fixture(params=["spawn", "forkserver"])
def method(request: pytest.FixtureRequest) -> Iterator[str]:
    """A start method that sends everything to processes: forkserver is Linux' own since Python 3.14, spawn macOS'."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


class Parted(IterableDataset[Any]):
    """The stream of torch's own documentation, each of whose workers yields a part."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return ((torch.full((3, 6, 6), float(index), dtype=torch.float64), index) for index in range(first, 23, step))


def test_processes_that_everything_is_sent_to(model: HookedViT, photos: Path, tmp_path: Path, method: str) -> None:
    tar(archive := tmp_path / "photos.tar", {path.name: path.read_bytes() for path in photos.rglob("*.png")})
    for kind, data in (("folder", photos), ("tar", archive), ("list", sorted(photos.rglob("*.png")))):
        one, two = (harvest(model, data, NAME, out=tmp_path / f"{kind}{n}", batch=4, workers=n) for n in (0, 2))
        assert torch.equal(one.read(NAME, 0, 26), two.read(NAME, 0, 26)), kind
        assert list(one.examples()) == list(two.examples()), kind


def test_processes_begin_by_themselves_where_they_are_copies_alone(model: HookedViT, method: str) -> None:
    """Others run the caller's script again, which is to be written for that."""

    def readers(**options: Any) -> set[int]:
        run = Pass(model, Numbered(300), NAME, batch=100, preprocess=None, **options)
        return {line["label"] for batch in run.batches() for line in batch.lines}

    assert readers() == {os.getpid()}
    assert len(readers(workers=2) - {os.getpid()}) == 2


def test_what_cannot_be_sent_to_processes(model: HookedViT, photos: Path, tmp_path: Path, method: str) -> None:
    def own(image: Any) -> torch.Tensor:
        return model.preprocess(image)[0]

    with pytest.raises(InputError, match=rf"{method}.*own.*workers=0"):
        harvest(model, photos, NAME, out=tmp_path / "out", batch=4, preprocess=own, workers=2)
    assert len(harvest(model, photos, NAME, out=tmp_path / "out", batch=4, preprocess=own, workers=0)) == 26


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_streams_that_share_themselves_out(model: HookedViT, tmp_path: Path, workers: int) -> None:
    acts = harvest(model, Parted(), NAME, out=tmp_path, batch=4, preprocess=None, workers=workers, dtype="float32")
    assert [line["label"] for line in acts.examples()] == list(range(23))
    pixels = torch.stack([each for each, _ in Parted()])
    truth = torch.cat([model.run_with_cache(part, names=[NAME])[1][NAME] for part in pixels.split(4)]).float()
    assert torch.equal(acts.read(NAME, 0, 23), truth)


def test_data_are_found_from_any_folder(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of a cluster begins in another one than the caller's."""
    tar(tmp_path / "photos.tar", {path.name: path.read_bytes() for path in photos.rglob("*.png")})
    monkeypatch.chdir(tmp_path)
    for data in (Path("photos"), "photos.tar"):
        opened = open_data(data)
        assert opened.get is not None
        before = opened.get(3)
        monkeypatch.chdir("/")
        assert opened.get(3) == before
        monkeypatch.chdir(tmp_path)
        assert opened.fingerprint == open_data(tmp_path / data).fingerprint
