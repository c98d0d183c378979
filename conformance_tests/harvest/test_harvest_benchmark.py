"""The benchmark of harvests runs, on little, and counts what it says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def benchmark_of_harvests(monkeypatch: pytest.MonkeyPatch) -> Any:
    torch.set_default_dtype(torch.float32)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "harvest", raising=False)
    import harvest

    return harvest


def test_each_part_runs(benchmark_of_harvests: Any, tmp_path: Path) -> None:
    found = benchmark_of_harvests.rates("toy:scenes-3l", images=4, batch=2, rounds=1)
    assert set(found["shares"]) == {"tensors", "files"}
    assert set(found["shares"]["files"]) == {"processor", "clock"}
    assert all(0 < spent < 600 for side in found["best"].values() for spent in side)
    seen = benchmark_of_harvests.memory(images=8, batch=4)
    assert list(seen) == [0, 4]
    assert min(seen.values()) > 1
    assert benchmark_of_harvests.reading(32, 3, 8, 16, rounds=1)["in order"] > 0


def test_the_files_are_images_and_the_harvest_of_noise_is_whole(benchmark_of_harvests: Any, tmp_path: Path) -> None:
    from prisma_harvest import verify

    folder = benchmark_of_harvests.photos(tmp_path / "photos", 70, 16)
    assert len(list(folder.iterdir())) == 70
    acts = benchmark_of_harvests.written(tmp_path / "out", 64, 3, 8)
    assert len(acts) == 64
    assert verify(acts.path) == []
