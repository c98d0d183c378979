"""Write a harvest: one pass over the data, gone on with after whatever stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prisma_core import HookedModel, InputError, LoadError
from prisma_core.plugin import Count, Query, check_keywords, checked, keyword_names
from prisma_harvest.folder import Writer
from prisma_harvest.manifest import DTYPES, Dtype, Whole, example_bytes
from prisma_harvest.opening import open_harvest
from prisma_harvest.passes import Pass, Pos
from prisma_harvest.progress import counting
from prisma_harvest.rays import connected, on_ray
from prisma_harvest.reading import Harvest

SHARD_BYTES = 128 * 2**20


@checked
def harvest(
    model: HookedModel,
    data: Any,
    names: Query,
    *,
    out: str | Path,
    pos: Pos = None,
    dtype: Dtype = "bfloat16",
    batch: Count = 32,
    shard: Count | None = None,
    progress: bool | None = None,
    ray: str | None = None,
    **options: Any,
) -> Harvest:
    """Write the activations of a model over data to a folder inside ``out``, and return it, open.

    The folder is named by the hash of its manifest: model and weights, hook points, tokens, dtype, preprocessing, data.
    The same call after whatever stopped it (a kill, a full disk) goes on where it was, with the same bytes in the end;
    once the folder is whole it is returned as it is.

    >>> import tempfile
    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> data = [(sample_scene(seed).image, f"scene {seed}") for seed in range(16)]
    >>> acts = harvest(model, data, ("resid_post", 1), pos="patches", out=tempfile.mkdtemp())
    >>> next(acts.rows(("resid_post", 1), 1024, shuffle=True)).shape
    torch.Size([1024, 128])

    Args:
        model: any hooked model of images or videos. Of a pair of towers the vision tower runs.
        data: a folder, tar shards, a list, a data set, an iterable (see ``prisma_harvest.open_data``).
        names: the hook points: one pass whatever their number.
        out: where the folder goes.
        pos: the tokens: a subset of the layout (``"cls"``, ``"patches"``, ...), positions, or None for all.
        dtype: on disk.
        batch: images at once. Rounding depends on it, so it is in the manifest.
        shard: images in a file, rounded up to batches; None for about 128 MiB.
        progress: show a bar with rate and time left; None shows one on a terminal.
        ray: the address of a Ray cluster, or ``"local"`` for one on this machine: its workers share the shards out, and
            the bytes are those of one process. ``out`` is a folder that all of them see.
        options: of ``Pass``: ``preprocess``, ``limit``, ``on_error``, ``workers``, ``data_name``, ``image_column``,
            ``label_column``, ``note``.

    Raises:
        InputError: the data cannot be read, a value is too large for float16, a stream is given to a cluster, or there
            is no such option.
        UnknownName: a name matches no hook point.
        LoadError: another process writes the same harvest, or the disk is full or refuses.
    """
    if dtype not in DTYPES:
        raise InputError(f"Expected dtype as one of {', '.join(DTYPES)}, got {dtype!r}.")
    check_keywords("harvest", options, keyword_names(Pass))
    run = Pass(model, data, names, pos=pos, batch=batch, **options)
    manifest = run.manifest(dtype, _shard(run, dtype, shard))
    stream = run.source.n is None
    writer = Writer(Path(out) / manifest.name, manifest, stream=stream)
    if Whole.read(writer.folder) is not None and not stream:
        with writer.alone():
            writer.tidy()
        return open_harvest(writer.folder)
    if ray is not None:
        cluster = connected(run, ray)
        with writer.alone():
            writer.prepare()
            on_ray(cluster, run, writer, progress)
            writer.finish()
        return open_harvest(writer.folder)
    start = writer.done()
    batches = run.batches(start * manifest.shard // batch)  # workers start before the lock, which they would inherit
    with writer.alone():
        if writer.done() != start:
            raise LoadError(f"{writer.folder} was written by another process just now: run this again.")
        writer.prepare()
        total, done = run.limit if stream else run.source.n, 0 if stream else start * manifest.shard
        with writer, counting("Harvesting", total, done, progress) as advance:
            for group, activations in run.activations(batches):
                writer.add(group, activations)
                advance(group.size)
            writer.finish()
    return open_harvest(writer.folder)


def _shard(run: Pass, dtype: Dtype, shard: Count | None) -> int:
    """Return how many images a shard covers: a multiple of the batch."""
    if shard is None:
        return max(1, SHARD_BYTES // max(1, example_bytes(run.points, dtype)) // run.batch) * run.batch
    if shard < 1:
        raise InputError(f"Expected at least one image a shard, got {shard}.")
    return -(-shard // run.batch) * run.batch
