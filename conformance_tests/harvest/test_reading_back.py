"""Rows in order, shuffled, shared out; Arrow; every reader gives every row once."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from prisma_harvest import Harvest, harvest
from prisma_harvest import reading as readers
from prisma_harvest.shuffling import Chunk, cut, dealt
from torch.utils.data import DataLoader

from prisma_core import HookedViT, InputError, LoadError, NotApplicable, UnknownName

RESID, Z, PATTERN, POOLED = (
    "blocks.0.hook_resid_post",
    "blocks.1.attn.hook_z",
    "blocks.1.attn.hook_pattern",
    "hook_pooled",
)


@pytest.fixture
def acts(model: HookedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harvest:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 3 * 10 * 24 * 4)  # three examples, so that there are many chunks
    images = torch.randn(53, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how = {"preprocess": None, "batch": 4, "shard": 8, "dtype": "float32", "workers": 0}
    return harvest(model, list(images), [RESID, Z, PATTERN, POOLED], out=tmp_path, **how)


def multiset(rows: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, rows.tolist()))


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_rows_in_order(acts: Harvest, batch: int) -> None:
    groups = list(acts.rows(RESID, batch))
    assert all(len(group) == batch for group in groups[:-1])
    assert torch.equal(torch.cat(groups), acts.read(RESID, 0, 53).flatten(0, 1))
    groups = list(acts.rows(("z", 1), batch))
    assert torch.equal(torch.cat(groups), acts.read(Z, 0, 53).flatten(2).flatten(0, 1))
    assert torch.equal(torch.cat(list(acts.rows(POOLED, batch))), acts.read(POOLED, 0, 53))


@pytest.mark.parametrize(("batch", "buffer"), [(1, 5), (16, 40), (64, 64), (64, 10_000)])
def test_shuffled_rows_are_every_row_once(acts: Harvest, batch: int, buffer: int) -> None:
    ordered = torch.cat(list(acts.rows(RESID, 64)))
    groups = list(acts.rows(RESID, batch, shuffle=True, buffer=buffer, seed=3))
    rows = torch.cat(groups)
    assert multiset(rows) == multiset(ordered)
    assert len(groups) == -(-530 // batch)
    assert torch.equal(rows, torch.cat(list(acts.rows(RESID, batch, True, buffer, 3))))
    assert not torch.equal(rows, torch.cat(list(acts.rows(RESID, batch, True, buffer, 4))))


@pytest.mark.parametrize("batch", [1, 64, 10_000])
def test_a_file_that_fits_in_the_buffer_is_shuffled_without_one(
    model: HookedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 3 * 10 * 24 * 4)
    images = torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how = {"preprocess": None, "batch": 4, "shard": 20, "dtype": "float32", "workers": 0}
    acts, held = harvest(model, list(images), [RESID, Z, PATTERN], out=tmp_path, **how), list[int]()
    allocate = readers.buffers
    monkeypatch.setattr(readers, "buffers", lambda *how: held.append(how[2]) or allocate(*how))
    pairs = list(acts.rows([RESID, Z], batch, shuffle=True, seed=3))
    assert held == [30]  # one run of three examples
    for at, name in enumerate((RESID, Z)):
        rows = torch.cat([pair[at] for pair in pairs])
        whole = acts.read(name, 0, 20).flatten(2).flatten(0, 1)
        assert multiset(rows) == multiset(whole)
        assert not torch.equal(rows, whole)
        assert all(len(pair[at]) == batch for pair in pairs[:-1])
    first = pairs[0][0].zero_()
    assert not torch.equal(first, next(iter(acts.rows(RESID, batch, shuffle=True, seed=3))))
    again = torch.cat(list(acts.rows(RESID, batch, shuffle=True, seed=4)))
    assert not torch.equal(again, torch.cat(list(acts.rows(RESID, batch, shuffle=True, seed=3))))
    content = acts.shards[0].path.read_bytes()
    acts.shards[0].path.write_bytes(content[: len(content) // 2])
    with pytest.raises(LoadError, match=r"00000\.safetensors"):
        list(acts.rows(RESID, batch, shuffle=True))


def test_a_shuffled_batch_mixes_examples_from_all_over(acts: Harvest) -> None:
    """Labels: the number of the example, told by the row. In order a batch of 40 rows is 4 or 5 examples."""
    example = {tuple(row): at // 10 for at, row in enumerate(torch.cat(list(acts.rows(RESID, 64))).tolist())}
    drawn = [[example[tuple(row)] for row in rows.tolist()] for rows in acts.rows(RESID, 40, shuffle=True, buffer=300)]
    assert min(len(set(each)) for each in drawn if len(each) == 40) >= 15
    middle = sum(sum(each) / len(each) for each in drawn[:5]) / 5
    assert 15 < middle < 38  # the mean of 0..52 is 26


def test_several_hook_points_stay_together(acts: Harvest) -> None:
    pairs = dict(
        zip(map(tuple, torch.cat(list(acts.rows(RESID, 64))).tolist()), torch.cat(list(acts.rows(Z, 64))), strict=True)
    )
    for resid, z in acts.rows([RESID, Z], 32, shuffle=True, buffer=100):
        assert all(torch.equal(pairs[tuple(one.tolist())], other) for one, other in zip(resid, z, strict=True))
    with pytest.raises(NotApplicable, match="differ in tokens"):
        acts.rows([RESID, POOLED], 32)


def test_what_has_no_rows_says_so(acts: Harvest) -> None:
    with pytest.raises(NotApplicable, match="head query_pos key_pos"):
        acts.rows(PATTERN, 32)
    starts, patterns = zip(*acts.batches(PATTERN, 20), strict=True)
    assert starts == (0, 20, 40)
    assert torch.cat(patterns).shape == (53, 3, 10, 10)
    with pytest.raises(UnknownName, match="resid_pots"):
        acts.rows("resid_pots", 32)
    with pytest.raises(InputError, match="No example 53"):
        acts.example(53, RESID)
    with pytest.raises(InputError, match="part="):
        acts.rows(RESID, 32, part=(2, 2))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 2), (3, 0)])
def test_ranks_and_workers_share_every_row_out_once(acts: Harvest, shuffle: bool, world: int, workers: int) -> None:
    ordered = torch.cat(list(acts.rows(RESID, 64)))
    shares = []
    for rank in range(world):
        data = acts.dataset(RESID, 16, shuffle=shuffle, buffer=64, rank=rank, world=world)
        shares.append(torch.cat(list(DataLoader(data, batch_size=None, num_workers=workers))))
    assert multiset(torch.cat(shares)) == multiset(ordered)
    assert max(map(len, shares)) - min(map(len, shares)) <= 10 * max(1, workers)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_share_of_nothing_is_empty(acts: Harvest, shuffle: bool) -> None:
    shares = [list(acts.rows(RESID, 7, shuffle=shuffle, part=(which, 60))) for which in range(60)]
    assert [] in shares
    assert sum(len(rows) for share in shares for rows in share) == 530


def test_names_that_are_not_utf_8_are_text_in_arrow(model: HookedViT, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    image = np.zeros((6, 6, 3), np.uint8)
    made = harvest(model, [{"image": image, "path": name, "label": name}], RESID, out=tmp_path, workers=0)
    assert [line["path"] for line in made.examples()] == [name]
    table = made.to_arrow().read_all()
    assert (table["path"][0].as_py(), table["label"][0].as_py()) == ("\ufffd.png", "\ufffd.png")


def test_a_damaged_shard_is_told_by_both_readers(acts: Harvest) -> None:
    whole = acts.shards[2].path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    renamed = whole.replace(b"hook_resid_post", b"hook_resid_pots", 1)
    for content in (whole[: 8 + length + 100], renamed, b"", whole[:4], b"\xff" * 64):
        acts.shards[2].path.write_bytes(content)
        for shuffle in (False, True):
            with pytest.raises(LoadError, match=r"00002\.safetensors"):
                list(acts.rows(RESID, 16, shuffle=shuffle, buffer=64))
    acts.shards[2].path.unlink()
    for shuffle in (False, True):
        with pytest.raises(LoadError, match=r"00002\.safetensors"):
            list(acts.rows(RESID, 16, shuffle=shuffle, buffer=64))


def test_batches_that_are_kept_do_not_change(acts: Harvest) -> None:
    """The buffers are used again and again; what was given out is not."""
    kept = [(rows, rows.clone()) for rows in acts.rows(RESID, 16, shuffle=True, buffer=32)]
    assert len(kept) > 20
    assert all(torch.equal(rows, copy) for rows, copy in kept)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no word of what will be read")
def test_what_comes_next_is_announced(acts: Harvest, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: announced.append((start, size)))
    rows = acts.rows(RESID, 16, shuffle=True, buffer=32)
    assert sum(len(each) for each in rows) == 53 * 10
    assert announced
    assert all(start > 0 and size > 0 for start, size in announced)


def test_epochs_differ(acts: Harvest) -> None:
    data = acts.dataset(RESID, 16, shuffle=True, buffer=64)
    first = torch.cat(list(data))
    data.epoch = 1
    assert not torch.equal(first, torch.cat(list(data)))
    assert multiset(first) == multiset(torch.cat(list(data)))
    data.drop_last = True
    assert {len(rows) for rows in data} == {16}


def test_arrow(acts: Harvest) -> None:
    pytest.importorskip("pyarrow")
    table = acts.to_arrow([RESID, PATTERN], batch=10).read_all()
    assert table.column_names == ["example", "source", "path", "label", "sha256", RESID, PATTERN]
    assert table["example"].to_pylist() == list(range(53))
    assert table["sha256"].to_pylist() == [line["sha256"] for line in acts.examples()]
    field = table.schema.field(PATTERN)
    assert (field.metadata[b"axes"], field.metadata[b"shape"]) == (b"head query_pos key_pos", b"[3, 10, 10]")
    for name in (RESID, PATTERN):
        rows = torch.tensor(table[name].to_pylist())
        assert torch.equal(rows, acts.read(name, 0, 53).flatten(1))


@pytest.mark.parametrize("parts", [1, 2, 5, 60])
def test_chunks_are_dealt_without_gap_or_overlap(parts: int) -> None:
    chunks = cut([8, 0, 8, 5], 3)
    assert sum(chunk.stop - chunk.start for chunk in chunks) == 21
    shares = [dealt(chunks, part, parts) for part in range(parts)]
    places = [(chunk.shard, at) for share in shares for chunk in share for at in range(chunk.start, chunk.stop)]
    assert places == [(shard, at) for shard, n in enumerate([8, 0, 8, 5]) for at in range(n)]
    sizes = [sum(chunk.stop - chunk.start for chunk in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert dealt([Chunk(0, 0, 3), Chunk(1, 0, 3)], 0, 4) == [Chunk(0, 0, 1)]
