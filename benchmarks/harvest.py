"""Measure harvests: their rate against bare loops, their memory over many images, and how fast they are read.

All sides of a table run in turn in one process, and the best of the rounds counts:

- ``rates``: a harvest of ready tensors against a loop of forward passes on them, and a harvest of JPEG files against a
  loop that decodes them with the same loader and runs them;
- ``memory``: resident memory while a harvest goes over many JPEG files;
- ``read``: shuffled reading against reading in order, from the page cache, or with ``--cold`` from the disk.

    OMP_NUM_THREADS=1 python benchmarks/harvest.py rates --model timm:vit_tiny_patch16_224 --images 256
    python benchmarks/harvest.py memory --images 20000
    python benchmarks/harvest.py read --cold
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from prisma_harvest import Harvest, Pass, harvest, open_harvest
from prisma_harvest.folder import Writer
from prisma_harvest.loading import Batch
from prisma_harvest.manifest import DataFacts, Manifest, ModelFacts, Point
from timing import Options, Row

import prisma_core as prisma

MODELS = ("vit_tiny_patch16_224", "vit_base_patch32_224")
DISTINCT = 64  # images; the files are copies of them


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="prisma-benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def photos(folder: Path, n: int, size: int) -> Path:
    """Write JPEG files of smooth noise, a quarter larger than ``size`` pixels."""
    folder.mkdir(parents=True)
    encoded: list[bytes] = []
    for seed in range(min(n, DISTINCT)):
        noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((size * 5 // 4, size * 5 // 4), Image.Resampling.BICUBIC).save(file, "JPEG")
        encoded.append(file.getvalue())
    for index in range(n):
        (folder / f"{index:06d}.jpg").write_bytes(encoded[index % len(encoded)])
    return folder


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the processor time of some work, with that of processes that it ended, and the time it took."""

    def processor() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    before, start = processor(), time.perf_counter()
    work()
    return processor() - before, time.perf_counter() - start


# -------------------------------------------------------------------- rates


class Ready:
    """A data set of tensors that are ready for the model."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def rates(
    reference: str,
    *,
    names: Any = ("resid_post", -1),
    images: int = 256,
    batch: int = 32,
    rounds: int = 3,
    workers: int = 0,
) -> dict[str, Any]:
    """Return the share of each bare loop's speed that a harvest has, by processor time and by the clock.

    Weights are random. A harvest of one batch is timed too, and taken off: starting (the hash of the weights, the first
    image) costs the same for any number of images. The loops leave that batch out.
    """
    model = prisma.load(reference, pretrained=False).eval()
    size = model.sample_inputs()[0].shape[-1]
    with scratch() as folder, torch.no_grad():
        files = photos(folder / "photos", images, size)
        ready = Ready(torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0)))
        groups = ready.images.split(batch)
        how: dict[str, Any] = {"batch": batch, "workers": workers}
        decoding = Pass(model, files, names, **how)

        def bare() -> None:
            for group in groups[1:]:
                model(group)

        def decode() -> None:
            for group in decoding.batches(1):
                model(group.pixels)

        def write(data: Any, **more: Any) -> None:
            shutil.rmtree(folder / "out", ignore_errors=True)
            harvest(model, data, names, out=folder / "out", progress=False, **how, **more)

        sides: dict[str, Callable[[], None]] = {
            "bare loop": bare,
            "harvest of tensors": lambda: write(ready, preprocess=None),
            "tensors, one batch": lambda: write(ready, preprocess=None, limit=batch),
            "decoding loop": decode,
            "harvest of files": lambda: write(files),
            "files, one batch": lambda: write(files, limit=batch),
        }
        times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for at in range(rounds + 1):
            for side, work in sides.items():
                measured = seconds(work)
                if at:  # the first round warms up
                    times[side].append(measured)
    best = {side: [min(each) for each in zip(*rows, strict=True)] for side, rows in times.items()}
    pairs = {"tensors": ("bare loop", "harvest of tensors"), "files": ("decoding loop", "harvest of files")}
    shares = {
        kind: {
            clock: best[loop][at] / (best[ours][at] - best[f"{kind}, one batch"][at])
            for at, clock in enumerate(("processor", "clock"))
        }
        for kind, (loop, ours) in pairs.items()
    }
    spread = {side: [statistics.median(one) for one in zip(*rows, strict=True)] for side, rows in times.items()}
    return {"model": reference, "images": images, "batch": batch, "shares": shares, "best": best, "median": spread}


# -------------------------------------------------------------------- memory


class Watched:
    """A data set of files that notes the resident memory now and then."""

    def __init__(self, paths: list[Path], every: int):
        self.paths, self.every, self.seen = paths, every, dict[int, float]()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Path:
        if index % self.every == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen[index] = resident * os.sysconf("SC_PAGE_SIZE") / 2**20
        return self.paths[index]


def memory(
    reference: str = "toy:scenes-3l", *, names: Any = "resid_post", images: int = 20_000, batch: int = 32
) -> dict[int, float]:
    """Return the resident memory in MiB by the number of images that were harvested."""
    model = prisma.load(reference)
    with scratch() as folder:
        files = photos(folder / "photos", images, 96)
        data = Watched(sorted(files.iterdir()), max(batch, images // 20))
        harvest(model, data, names, pos="patches", shard=32 * batch, batch=batch, workers=0, out=folder / "out")
    return data.seen


# -------------------------------------------------------------------- reading


def written(folder: Path, n: int, tokens: int, width: int, batch: int = 32) -> Harvest:
    """Write a harvest of noise in bfloat16, without a model."""
    point = Point(name="blocks.0.hook_resid_post", axes="pos d_model", shape=(tokens, width))
    absent: dict[str, Any] = dict.fromkeys(("reference", "spec", "behaviour"))
    manifest = Manifest(
        model=ModelFacts(kind="", weights="", tower="", dtype="float32", device="cpu", **absent),
        points=(point,),
        dtype="bfloat16",
        pos=None,
        layout=None,
        preprocess=None,
        data=DataFacts(kind="indexed", name="", examples=n, limit=None, fingerprint=""),
        batch=batch,
        shard=max(1, 2**27 // (tokens * width * 2) // batch) * batch,
    )
    writer = Writer(folder / manifest.name, manifest, stream=False)
    with writer.alone():
        writer.prepare()
        with writer:
            for start in range(0, n, batch):
                lines = [{"source": start + at, "path": None, "label": None, "sha256": ""} for at in range(batch)]
                noise = torch.randn(batch, tokens, width).bfloat16()
                writer.add(Batch(start, batch, lines), {point.name: noise})
            writer.finish()
    return open_harvest(writer.folder)


def forget(acts: Harvest) -> None:
    """Drop a harvest's files from the page cache, so that the next read is one of the disk."""
    for shard in acts.shards:
        with shard.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(
    n: int, tokens: int, width: int, batch: int, *, rounds: int = 4, cold: bool = False, **options: Any
) -> dict[str, float]:
    """Return the speed in order in GB/s, and the share of it that shuffled reading has, by clock and processor time.

    Rows are taken into a buffer in float32, as who trains on them does: rows in order are views of the file, and a page
    that nobody touches is not read.

    Args:
        cold: read from the disk, as a harvest larger than memory is, and not from the page cache.
    """
    with scratch() as folder:
        acts, taken = written(folder, n, tokens, width), torch.empty(batch, width)

        def read(shuffle: bool) -> None:
            if cold:
                forget(acts)
            for rows in acts.rows(acts.names[0], batch, shuffle, **options):
                taken[: len(rows)].copy_(rows)

        times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for at in range(rounds):
            for shuffle in (False, True) if at % 2 else (True, False):
                times[shuffle].append(seconds(lambda shuffle=shuffle: read(shuffle)))
    (ours, clock), (theirs, mine) = ([min(each) for each in zip(*times[kind], strict=True)] for kind in (False, True))
    rate = n * tokens * width * 2 / clock / 1e9
    return {"in order": rate, "shuffled by the clock": clock / mine, "shuffled by processor time": ours / theirs}


READINGS = ((3200, 197, 768, 4096), (3200, 197, 768, 256), (12000, 145, 128, 4096), (60000, 1, 768, 4096))


def rows(options: Options) -> Iterator[Row]:
    """Return the harvests' rows of the table of all benchmarks: times, so the shares turned over."""
    clock = "processor" if options.clock is time.process_time else "clock"
    for name in options.models:
        found = rates(f"timm:{name}", images=128, rounds=2)
        for kind, loop in (("tensors", "a loop of passes"), ("files", "a loop that decodes and passes")):
            seconds = found["median"][f"harvest of {kind}"][clock == "clock"]
            ratio = round(1 / found["shares"][kind][clock], 3)
            yield Row("harvests", name, 32, f"harvest of {kind}", loop, ratio, round(seconds, 3), 2)
    for read in READINGS:
        share = reading(*read)["shuffled by the clock" if clock == "clock" else "shuffled by processor time"]
        examples, tokens, width, batch = read
        what = f"read {examples} x {tokens} x {width} shuffled"
        yield Row("harvests", "", batch, what, "read in order", round(1 / share, 3), None, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rates", "memory", "read"])
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--model", help="a reference")
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    some = {} if given.images is None else {"images": given.images}
    if given.what == "rates":
        model = given.model or "timm:vit_tiny_patch16_224"
        found: Any = rates(model, rounds=given.rounds, workers=given.workers, **some)
    elif given.what == "memory":
        found = memory(given.model or "toy:scenes-3l", **some)
    else:
        found = [{"harvest": each, **reading(*each, rounds=given.rounds, cold=given.cold)} for each in READINGS]
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
