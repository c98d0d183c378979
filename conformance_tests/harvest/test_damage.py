"""A harvest of which one bit, or one fact, is another: verifying tells, and reading never gives other numbers."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_harvest import Harvest, harvest, open_harvest, verify

from prisma_core import HookedViT, LoadError, PrismaError

RESID, POOLED = "blocks.0.hook_resid_post", "hook_pooled"


@pytest.fixture
def acts(model: HookedViT, tmp_path: Path) -> Harvest:
    images = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how: dict[str, Any] = {"preprocess": None, "batch": 2, "shard": 2, "workers": 0}
    return harvest(model, [(image, at) for at, image in enumerate(images)], [RESID, POOLED], out=tmp_path, **how)


def test_every_flipped_bit_is_found(acts: Harvest) -> None:
    chance, files = random.Random(0), [path for path in acts.path.rglob("*") if path.is_file()]
    assert len(files) == 7
    for path in files:
        data = path.read_bytes()
        places = range(len(data)) if path.suffix == ".json" else chance.sample(range(len(data)), min(100, len(data)))
        for at in places:
            flipped = bytearray(data)
            flipped[at] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            with contextlib.suppress(LoadError):
                assert verify(acts.path), f"{path.name}, byte {at}"
        path.write_bytes(data)
    assert verify(acts.path) == []


def facts_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from facts_of(each, (*path, key))
    else:
        yield path, value


def changed(facts: Any, path: tuple[Any, ...], value: Any) -> str:
    copy = json.loads(json.dumps(facts))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(copy, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def everything(folder: Path) -> list[Any]:
    read = open_harvest(folder)
    rows = [torch.cat(list(read.rows(name, 3, shuffle=shuffle))) for name in read.names for shuffle in (False, True)]
    whole = [read.read(name, 0, len(read)) for name in read.names]
    return [*(x.tolist() for x in rows + whole), list(read.examples())]


@pytest.mark.parametrize("file", ["manifest.json", "whole.json"])
def test_each_fact_by_itself(acts: Harvest, file: str) -> None:
    """Another name, shape, dtype or count: an error in words, or the numbers that were written."""
    path, truth = acts.path / file, everything(acts.path)
    text = path.read_text(encoding="utf-8")
    facts, refused = json.loads(text), set[tuple[Any, ...]]()
    for place, value in facts_of(facts):
        others: list[Any] = [value + 1, max(0, value - 1), -1] if type(value) is int else ["other", None, 7]
        for other in (each for each in others if each != value):
            path.write_text(changed(facts, place, other), encoding="utf-8")
            with contextlib.suppress(LoadError):
                assert verify(acts.path), (place, other)
            try:
                assert everything(acts.path) == truth, (place, other)
            except PrismaError:
                refused.add(place)
    path.write_text(text, encoding="utf-8")
    shapes = [("points", at, part) for at in (0, 1) for part in ("name", "axes")]
    shapes += [("points", 0, "shape", 0), ("points", 0, "shape", 1), ("points", 1, "shape", 0), ("dtype",)]
    counts = [("examples",), *(("shards", f"0000{shard}.safetensors", "examples") for shard in range(3))]
    assert set(shapes if file == "manifest.json" else counts) <= refused


def test_an_older_schema_is_not_said_to_be_newer(acts: Harvest) -> None:
    path = acts.path / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"schema_version": 1', '"schema_version": 0'))
    with pytest.raises(LoadError, match=r"schema 0.*harvest again"):
        open_harvest(acts.path)
