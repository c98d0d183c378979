"""Verify a harvest: every byte is as it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from prisma_core import LoadError
from prisma_core.plugin import check_call, check_regular, checked, file_digest, read_text
from prisma_harvest.folder import read_lines
from prisma_harvest.manifest import EXAMPLES, MANIFEST, SHARDS, SKIPPED, WHOLE, Whole, as_json
from prisma_harvest.opening import open_harvest
from prisma_harvest.reading import Harvest


@checked
def verify(path: str | Path, advance: Callable[[int], None] | None = None) -> list[str]:
    """Return what is wrong with a harvest, a line for each file; nothing where every byte is as it was written.

    >>> from prisma_harvest import harvest
    >>> import tempfile
    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> data = [sample_scene(seed).image for seed in range(16)]
    >>> acts = harvest(model, data, ("resid_post", 1), out=tempfile.mkdtemp())
    >>> verify(acts.path)
    []

    Args:
        path: as ``open_harvest`` takes it.
        advance: called with the number of examples behind each shard.

    Raises:
        LoadError: it is no harvest, or not whole.
    """
    if advance is not None:
        check_call(advance, 1, "advance=", "advance(examples)")
    acts = open_harvest(path)
    folder = acts.path
    whole = Whole.read(folder)
    assert whole is not None
    problems: list[str] = []
    name = file_digest(folder / MANIFEST)[:16]
    if name != folder.name or acts.manifest.name != name:
        problems.append(f"{MANIFEST}: its hash is {name}, and the folder is called {folder.name}")
    known = {MANIFEST, WHOLE}
    problems += _record(acts, whole)
    files = {f"{SHARDS}/{shard}": (each.sha256, each.examples) for shard, each in whole.shards.items()}
    files |= {lines: (sha256, 0) for lines, sha256 in whole.lines.items()}
    for file, (sha256, examples) in files.items():
        try:
            if file_digest(folder / file) != sha256:
                problems.append(f"{file}: not the bytes that were written")
        except (OSError, LoadError) as error:
            problems.append(f"{file}: {error.strerror if isinstance(error, OSError) else error}")
        if advance is not None:
            advance(examples)
    found = {one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()}
    return problems + [f"{file}: is no part of the harvest" for file in sorted(found - known - set(files))]


def _record(acts: Harvest, whole: Whole) -> list[str]:
    """Return what is wrong with the record, which no hash covers: it says what the other files hold."""
    problems = list[str]()
    if read_text(acts.path / WHOLE) != as_json(whole.model_dump(mode="json")):
        problems.append(f"{WHOLE}: not the text that was written")
    held = dict[str, int]()
    for name in (EXAMPLES, SKIPPED):
        try:
            held[name] = sum(1 for _ in read_lines(acts.path / name))
        except LoadError:
            continue  # which its hash tells
    said = {EXAMPLES: whole.examples, SKIPPED: whole.skipped}
    problems += [f"{WHOLE}: says {said[name]}, and {name} has {n}" for name, n in held.items() if said[name] != n]
    for shard in acts.shards:
        try:
            check_regular(shard.path)
            with safe_open(shard.path, "pt") as file:
                n = file.get_slice(acts.names[0]).get_shape()[0]
        except (OSError, SafetensorError, LoadError):
            continue
        if n != shard.n:
            problems.append(f"{WHOLE}: says {shard.n} examples of {SHARDS}/{shard.path.name}, which holds {n}")
    return problems
