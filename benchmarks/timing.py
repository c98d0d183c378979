"""Two sides timed in turn in one process: a row of the table is the ratio of their medians."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

Side = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """What a run of the benchmarks was asked for."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    budget: float
    device: torch.device
    clock: Callable[[], float] = time.perf_counter
    compiled: bool = True

    @property
    def kind_of_time(self) -> str:
        return "processor time" if self.clock is time.process_time else "time by the clock"


@dataclass(frozen=True)
class Row:
    """One cell of the table.

    ``ratio`` is the median time of ``what`` by that of ``against``; ``seconds`` is the median of ``what``, ``runs`` is
    how often each side ran. A cell that was not timed has no numbers and a ``note``.
    """

    group: str
    model: str
    batch: int
    what: str
    against: str
    ratio: float | None = None
    seconds: float | None = None
    runs: int = 0
    note: str = ""


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(side: Side, options: Options) -> float:
    """Return the seconds of one run."""
    synchronise(options.device)
    start = options.clock()
    side()
    synchronise(options.device)
    return options.clock() - start


def against(one: Side, other: Side, options: Options, *, warm: int = 2) -> dict[str, Any]:
    """Run two sides in turn, the first one changing, and return a row's numbers.

    Each side runs for about half of the budget in seconds, at least 3 and at most 101 times, after ``warm`` runs more
    that do not count, or fewer where these take longer than the budget.
    """
    began = options.clock()
    for _ in range(warm + 1):
        pair = once(one, options) + once(other, options)
        if options.clock() - began > options.budget:
            break
    runs = min(101, max(3, round(options.budget / pair)))
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(runs):
        for at in (0, 1) if index % 2 else (1, 0):
            times[at].append(once((one, other)[at], options))
    mine, theirs = map(statistics.median, times)
    return {"ratio": round(mine / theirs, 3), "seconds": round(mine, 4), "runs": runs}


def timed(row: Row, one: Side, other: Side, options: Options, *, warm: int = 2) -> Row:
    """Return a row with its numbers, or with what kept it from being timed."""
    try:
        return replace(row, **against(one, other, options, warm=warm))
    except torch.OutOfMemoryError:
        return replace(row, note="out of memory")


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free, on the device or, for the CPU, on the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def draw(module: torch.nn.Module, std: float = 0.03) -> None:
    """Draw every parameter of a model from a normal distribution, with one seed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))


def conditions(options: Options, **versions: str) -> str:
    """Return the machine and the versions in one line."""
    device = options.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    listed = ", ".join(f"{library} {version}" for library, version in versions.items())
    return f"{name}, {listed}, {time.strftime('%Y-%m-%d')}; medians of {options.kind_of_time}"
