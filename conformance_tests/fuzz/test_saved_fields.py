"""Every fact that Prisma writes into a file, changed by itself: the same thing comes back, or one sentence does.

Each value becomes each of some thirty others, is left out, or is moved a little; a part of them in every run, all of
them in the long profile.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import prisma_harvest
import pytest
import torch
from hypothesis import settings
from prisma_conformance.pytest import COUNTS
from prisma_patch import Circuit
from written import SUBJECTS, Written, edits, nodes

import prisma_core as prisma
from prisma_core import InputError, LoadError, PrismaError, Result, TokenLayout
from prisma_core.plugin import parse_json

SAMPLE = 60
# What no other fact and no tensor contradicts, in files that hold no digest of their facts.
FREE = {
    "a vocabulary": r"words.*|length",
    "an older model": r".*",
    "an older pair of towers": r".*",
    "an older sparse coder": r".*",
    "a circuit": r"cfg\.d_model|edges\..*\.(score|in_graph)",
    "a result": r"(labels|axes)(\..*)?|technique|unit|baseline|total|facts.*",
    "a cache": r"layout\.\w+|pos(\..*)?|axes.*",
}


@pytest.fixture(autouse=True)
def within_memory() -> Iterator[None]:
    """Whatever asks for more than 1.5 GB beyond what is there fails."""
    resource = pytest.importorskip("resource")
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + (3 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.filterwarnings("ignore")
def test_a_changed_fact_changes_nothing_or_is_refused(
    name: str, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    written = Written(SUBJECTS[name], tmp_path)
    every = list(edits(written.facts))
    n = len(every) if settings.default.max_examples >= 1000 else min(SAMPLE, len(every))
    kinds: Counter[str] = Counter()
    for edit in random.Random(name).sample(every, n):
        outcome = written.judge(edit)
        free = outcome.kind == "other" and re.fullmatch(FREE.get(name, ""), ".".join(map(str, edit.at)))
        assert outcome.kind in ("same", "refused") or free, f"{edit}: {outcome}"
        kinds[outcome.kind] += 1
    assert kinds["refused"] > n / 9  # the values are wrong enough
    record_property(COUNTS, json.dumps(["changed facts in files", {"files": 1, "cases": n}]))


def test_the_sweep_reaches_every_fact(tmp_path: Path) -> None:
    for name in ("a model", "a result"):
        written = Written(SUBJECTS[name], tmp_path / name)
        assert {edit.at for edit in edits(written.facts)} == set(nodes(written.facts))


# ------------------------------------------------------------ each fault that the sweep found


def test_a_fact_that_another_value_fits_too_is_missed_by_no_model(tmp_path: Path) -> None:
    """An eps of 1e-5 in the place of 1e-6 is as good a fact: only a digest tells."""
    written = Written(SUBJECTS["a model"], tmp_path)
    facts = json.loads(written.path.read_text())
    facts["spec"]["blocks"][0]["ln1"]["eps"] = 1e-5
    written.put(facts)
    with pytest.raises(LoadError, match=r"says something else than when it was written.*remove weights\.facts"):
        prisma.load(f"file:{tmp_path}")
    del facts["weights"]["facts"]
    written.put(facts)
    assert prisma.load(f"file:{tmp_path}").spec.blocks[0].ln1.eps == 1e-5


def test_a_harvest_is_what_its_folder_is_called(tmp_path: Path) -> None:
    written = Written(SUBJECTS["a manifest"], tmp_path)
    written.put({**written.facts, "note": "another"})
    with pytest.raises(LoadError, match="its hash is"):
        prisma_harvest.open_harvest(tmp_path)
    moved = written.path.parent.rename(tmp_path / "mine")  # a name of one's own holds no promise
    assert prisma_harvest.open_harvest(moved).manifest.note == "another"


@pytest.mark.parametrize("shard", ["../../x.safetensors", "/etc/passwd", "00000.safetensors/.."])
def test_a_harvests_record_leads_nowhere_else(shard: str, tmp_path: Path) -> None:
    written = Written(SUBJECTS["a harvest's record"], tmp_path)
    shards = dict(zip([shard, *list(written.facts["shards"])[1:]], written.facts["shards"].values(), strict=True))
    written.put({**written.facts, "shards": shards})
    with pytest.raises(LoadError, match=r"whole\.json is damaged"):
        prisma_harvest.open_harvest(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n_layers": 10**9}, "whole number from 1 to 65536"),
        ({"n_layers": 60_000}, "60000 layers of 2 heads, and 8 nodes"),
        ({"n_heads": True}, "n_heads as a whole number"),
        ({"d_model": float("inf")}, "d_model as a whole number"),
        ({"parallel_attn_mlp": "no"}, "true or false"),
    ],
)
def test_a_circuit_is_as_large_as_its_file(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    written = Written(SUBJECTS["a circuit"], tmp_path)
    written.put({**written.facts, "cfg": {**written.facts["cfg"], **change}})
    with pytest.raises(LoadError, match=told):
        Circuit.load(written.path)


def test_a_circuit_without_an_edge_is_damaged(tmp_path: Path) -> None:
    written = Written(SUBJECTS["a circuit"], tmp_path)
    edges = dict(list(written.facts["edges"].items())[1:])
    written.put({**written.facts, "edges": edges})
    with pytest.raises(LoadError, match=rf"{len(edges) + 1} edges by its sizes, and {len(edges)} in the file"):
        Circuit.load(written.path)


def test_labels_are_texts() -> None:
    with pytest.raises(InputError, match="labels of 'head' in words, got 3"):
        Result(torch.zeros(2), ("head",), {"head": ("a", cast(Any, 3))})


def test_a_layout_has_as_many_tokens_as_a_model_can_have() -> None:
    assert TokenLayout(rows=1024, columns=1024).n_tokens == 1 << 20
    with pytest.raises(PrismaError, match="larger than the 1048576"):
        TokenLayout(rows=1024, columns=1025)


def test_half_a_letter_is_no_text() -> None:
    assert parse_json('{"a": "\\ud83d\\ude00"}', "here") == {"a": "😀"}
    with pytest.raises(LoadError, match="here is no readable JSON"):
        parse_json('{"a": "\\ud83d"}', "here")
