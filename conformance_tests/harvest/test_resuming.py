"""Whatever stops a harvest, it goes on with the same bytes; two writers of one folder are one too many."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_harvest import harvest, open_harvest

from prisma_core import HookedViT, InputError, LoadError

FORK = multiprocessing.get_context("fork")
NAMES = [("resid_post", 0), ("z", 1)]
Content = Callable[[Path], dict[str, bytes]]


class Slow:
    """A data set that takes its time, so that a kill falls into the middle."""

    def __init__(self, n: int, pause: float = 0.0):
        self.n, self.pause = n, pause

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(self.pause)
        pixels = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        return {"image": pixels, "label": index % 5}


def stream(n: int, offset: int = 0) -> Iterator[tuple[torch.Tensor, int]]:
    """Images that a generator makes: the first twelve never change, those behind by ``offset``."""
    for index in range(n):
        seed = index if index < 12 else index + offset
        yield torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), index


def run(model: HookedViT, data: Any, out: Path, **options: Any) -> Path:
    how = {"preprocess": None, "batch": 2, "shard": 4, "workers": 0, **options}
    return harvest(model, data, NAMES, out=out, **how).path


def in_child(work: Callable[[], object]) -> int:
    """Run something in a forked process and return its exit code; -9 where it was killed."""
    process = FORK.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_a_kill_at_every_file(model: HookedViT, tmp_path: Path, content: Content, when: str, kind: str) -> None:
    """Killed just before, or just after, each file takes its place."""

    def data() -> Any:
        return Slow(11) if kind == "indexed" else stream(11)

    whole = content(run(model, data(), tmp_path / "whole"))
    assert len([name for name in whole if "shards/" in name]) == 3
    replace = os.replace

    def killed(number: int) -> Callable[[], None]:
        def work() -> None:
            seen = iter(range(1_000))

            def kill(source: Any, target: Any) -> None:
                last = next(seen) == number
                if last and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = kill  # type: ignore[assignment]
            run(model, data(), tmp_path / str(number))

        return work

    kills = 0
    while in_child(killed(kills)) == -signal.SIGKILL:
        after = content(run(model, data(), tmp_path / str(kills)))
        assert after == whole, f"killed {when} file {kills}"
        kills += 1
    assert kills == 10  # the manifest, three times lines and a shard, examples, skipped, the record


def test_twenty_kills_at_random_moments(model: HookedViT, tmp_path: Path, content: Content) -> None:
    """SIGKILL a random while behind a random number of further shards, again and again, with workers that decode.

    A harvest that gets through is compared, and begun anew: there are twenty kills in all.
    """
    data, out = Slow(60, pause=0.004), tmp_path / "out"
    whole = content(run(model, data, tmp_path / "whole", workers=2))
    chance = random.Random(0)

    def shards() -> int:
        return len(list(out.glob("*/shards/0*")))

    kills, resumed = 0, set[int]()
    while kills < 20:
        process = FORK.Process(target=run, args=(model, data, out), kwargs={"workers": 2})
        process.start()
        further = shards() + chance.randint(0, 2)
        while process.is_alive() and shards() < further:
            time.sleep(0.002)
        process.join(chance.uniform(0.0, 0.05))
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            resumed.add(shards())
            continue
        assert process.exitcode == 0
        assert content(out / next(iter(os.listdir(out)))) == whole
        shutil.rmtree(out)
    assert len(resumed) >= 4
    assert content(run(model, data, out)) == whole


def test_what_is_done_is_not_done_again(model: HookedViT, tmp_path: Path) -> None:
    class Broken(Slow):
        asked: list[int] = []  # noqa: RUF012

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.asked.append(index)
            if index == 89 and self.pause:
                raise KeyError("no such row")
            return super().__getitem__(index)

    with pytest.raises(InputError, match=r"Image 89 .*no such row"):
        run(model, Broken(91, pause=1e-9), tmp_path)
    Broken.asked.clear()
    acts = open_harvest(run(model, Broken(91), tmp_path))
    assert len(acts) == 91
    assert Broken.asked[-3:] == [88, 89, 90]
    assert len(Broken.asked) <= 3 + 16 + 2  # those of the pass, the sample of the fingerprint, the first image


def test_a_full_disk(model: HookedViT, tmp_path: Path, content: Content) -> None:
    """A limit on the size of files refuses in the middle of a shard, as a full disk does."""
    whole = content(run(model, Slow(11), tmp_path / "whole", shard=8))
    largest = max(map(len, whole.values()))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))
        try:
            run(model, Slow(11), tmp_path / "out", shard=8)
        except LoadError as error:
            os._exit(3 if "00000.safetensors" in str(error) else 4)

    assert in_child(limited) == 3
    (folder,) = (tmp_path / "out").iterdir()
    assert not list(folder.rglob("*.safetensors"))
    with pytest.raises(LoadError, match="not whole"):
        open_harvest(folder)
    assert content(run(model, Slow(11), tmp_path / "out", shard=8)) == whole


def test_a_second_writer_is_refused(model: HookedViT, tmp_path: Path, content: Content) -> None:
    whole = content(run(model, Slow(24), tmp_path / "whole"))
    process = FORK.Process(target=run, args=(model, Slow(24, pause=0.05), tmp_path / "out"))
    process.start()
    while not list((tmp_path / "out").glob("*/shards/0*")):
        assert process.exitcode is None
        time.sleep(0.01)
    with pytest.raises(LoadError, match="being written by another process"):
        run(model, Slow(24), tmp_path / "out")
    process.join()
    assert process.exitcode == 0
    assert content(run(model, Slow(24), tmp_path / "out")) == whole


def test_workers_that_outlive_a_killed_writer_hold_no_lock(model: HookedViT, tmp_path: Path) -> None:
    process = FORK.Process(target=run, args=(model, Slow(200, pause=0.05), tmp_path), kwargs={"workers": 2})
    process.start()
    while not list(tmp_path.glob("*/shards/0*")):
        assert process.exitcode is None
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert len(open_harvest(run(model, Slow(200), tmp_path))) == 200


def test_another_stream_that_begins_alike_is_refused(model: HookedViT, tmp_path: Path, content: Content) -> None:
    folder = run(model, stream(22), tmp_path)
    before = content(folder)
    assert run(model, stream(22), tmp_path) == folder
    for data, position in ((stream(22, offset=100), 12), (stream(24), 22), (stream(17), 17)):
        with pytest.raises(LoadError, match=rf"another stream.*position {position}"):
            run(model, data, tmp_path)
    assert content(folder) == before
    assert run(model, stream(24), tmp_path, data_name="longer") != folder
    (folder / "whole.json").unlink()
    with pytest.raises(LoadError, match=r"another stream|cannot be read"):
        run(model, stream(22, offset=100), tmp_path)


def test_a_folder_without_its_first_shard_is_written_again(model: HookedViT, tmp_path: Path, content: Content) -> None:
    folder = run(model, Slow(11), tmp_path / "out")
    whole = content(folder)
    shutil.rmtree(folder / "shards")
    (folder / "whole.json").unlink()
    assert content(run(model, Slow(11), tmp_path / "out")) == whole
