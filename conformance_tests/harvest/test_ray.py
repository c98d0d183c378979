"""The same harvest on a local cluster of two workers: the same bytes, also where one of them is killed midway."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_harvest import harvest, verify

from prisma_core import HookedViT, InputError

ray = pytest.importorskip("ray", reason="the extra 'scale' is not installed")
pytest.importorskip("ray.data", reason="the extra 'scale' is not installed")
NAMES = [("resid_post", 0), ("z", 1)]


class Slow:
    """Tensors, each in a while; a file says which process was asked for which."""

    def __init__(self, log: Path, pause: float = 0.0):
        self.log, self.pause = log, pause

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> Any:
        time.sleep(self.pause)
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {index}\n")
        return torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(index), dtype=torch.float64), index


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def run(model: HookedViT, data: Any, out: Path, **options: Any) -> Path:
    how = {"preprocess": None, "batch": 2, "shard": 4, "workers": 0, **options}
    return harvest(model, data, NAMES, out=out, **how).path


def test_the_bytes_are_those_of_one_process(
    model: HookedViT, tmp_path: Path, content: Callable[[Path], dict[str, bytes]]
) -> None:
    whole = run(model, Slow(tmp_path / "log"), tmp_path / "whole")
    folder = run(model, Slow(tmp_path / "log"), tmp_path / "out", ray="local")
    assert content(folder) == content(whole)
    assert folder.name == whole.name
    with pytest.raises(InputError, match="folder, a list or a data set"):
        run(model, iter([Slow(tmp_path / "log")[0]] * 9), tmp_path / "out", ray="local")


def test_a_worker_that_is_killed_midway(
    model: HookedViT, tmp_path: Path, content: Callable[[Path], dict[str, bytes]]
) -> None:
    whole = content(run(model, Slow(tmp_path / "log"), tmp_path / "whole"))
    log = tmp_path / "asked"
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            rows = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
            theirs = [int(pid) for pid, _ in rows if int(pid) != os.getpid()]
            if len(theirs) > 8:
                os.kill(theirs[-1], signal.SIGKILL)
                killed.append(theirs[-1])
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill)
    thread.start()
    folder = run(model, Slow(log, pause=0.1), tmp_path / "out", ray="local")
    thread.join()
    assert len(killed) == 1
    assert len({line.split()[0] for line in log.read_text().splitlines()}) >= 3  # this process, and two workers
    assert content(folder) == whole
    assert verify(folder) == []
