"""Open a harvest, or several as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prisma_core import InputError, LoadError
from prisma_core.plugin import checked
from prisma_harvest.manifest import MANIFEST, SHARDS, Manifest, Whole
from prisma_harvest.reading import Harvest, Shard


@checked
def open_harvest(path: str | Path) -> Harvest:
    """Open a harvest: its own folder, or the one it was written into if that holds one alone.

    >>> import tempfile
    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> data = [(sample_scene(seed).image, f"scene {seed}") for seed in range(16)]
    >>> from prisma_harvest import harvest
    >>> acts = open_harvest(harvest(model, data, ("resid_post", 1), out=tempfile.mkdtemp()).path)
    >>> acts.example(0, ("resid_post", 1)).shape, acts.tokens_of(("resid_post", 1))[1]
    (torch.Size([145, 128]), 'r0c0')

    Raises:
        LoadError: there is none or several, it is not whole, or a file is damaged.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file():
        inside = sorted(one.parent for one in folder.glob(f"*/{MANIFEST}"))
        if len(inside) != 1:
            text = "no harvest" if not inside else f"several harvests: {', '.join(one.name for one in inside)}"
            raise LoadError(f"{folder} holds {text}. Expected a folder that `harvest` wrote.")
        folder = inside[0]
    manifest, whole = Manifest.read(folder), Whole.read(folder)
    if whole is None:
        raise LoadError(f"{folder} is not whole yet: run the same harvest again, and it goes on where it was.")
    return Harvest(
        (folder,), manifest, _placed([(folder / SHARDS / name, each.examples) for name, each in whole.shards.items()])
    )


@checked
def cat(*harvests: Harvest) -> Harvest:
    """Return several harvests as one, in this order, without a copy.

    >>> from prisma_harvest import harvest
    >>> import tempfile
    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> data = [sample_scene(seed).image for seed in range(16)]
    >>> acts = harvest(model, data, ("resid_post", 1), out=tempfile.mkdtemp())
    >>> len(cat(acts, acts))
    32

    Raises:
        InputError: none is given, or they differ in model, hook points, tokens, dtype or preprocessing.
    """
    if not harvests:
        raise InputError("Expected at least one harvest.")
    first = harvests[0].manifest
    for other in harvests[1:]:
        for what in ("model", "points", "pos", "layout", "preprocess", "dtype", "note"):
            mine, theirs = getattr(first, what), getattr(other.manifest, what)
            if what == "model":  # where it ran and what it was called do not matter
                mine, theirs = (each.model_copy(update={"device": "", "reference": None}) for each in (mine, theirs))
            if mine != theirs:
                raise InputError(f"{harvests[0].path} and {other.path} differ in {what}: {mine} and {theirs}.")
    folders = tuple(folder for each in harvests for folder in each.folders)
    return Harvest(folders, first, _placed([(shard.path, shard.n) for each in harvests for shard in each.shards]))


def _placed(files: Sequence[tuple[Path, int]]) -> tuple[Shard, ...]:
    shards, start = list[Shard](), 0
    for path, n in files:
        shards.append(Shard(path, start, n))
        start += n
    return tuple(shards)
