"""``prisma harvest`` on a bundled toy: write, look, verify, and what is refused."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prisma_harvest import open_harvest, options
from prisma_toy import sample_scene

import prisma_core as prisma
from prisma_core.cli.app import main
from prisma_core.plugin import installed


@pytest.fixture(autouse=True)
def _float32() -> None:
    torch.set_default_dtype(torch.float32)


def words(out: Path, *more: str) -> list[str]:
    options = ["--data", "samples:6", "--names", "resid_post:1", "--names", "blocks.2.mlp.hook_post", "--batch", "4"]
    return ["harvest", "toy:scenes-3l", *options, "--out", str(out), *more]


def test_a_harvest_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path, "--pos", "0,5", "--dtype", "float32")) == 0
    printed = capsys.readouterr()
    acts = open_harvest(printed.out.strip())
    assert "6 examples" in printed.err
    assert acts.names == ["blocks.1.hook_resid_post", "blocks.2.mlp.hook_post"]
    assert acts.tokens_of(acts.names[0]) == ["cls", "r0c4"]
    model = prisma.load("toy:scenes-3l")
    assert acts.manifest.model.reference == "toy:scenes-3l"
    images = model.preprocess([installed().source("toy").sample("scenes-3l", seed) for seed in range(4)])
    _, cache = model.run_with_cache(images, names=acts.names, pos=[0, 5])
    assert torch.equal(acts.read(acts.names[1], 0, 4), cache[acts.names[1]])

    assert main(["harvest", "info", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["examples"], facts["skipped"], facts["manifest"]["pos"]) == (6, 0, [0, 5])
    assert main(["harvest", "info", str(tmp_path)]) == 0
    assert "blocks.2.mlp.hook_post: pos d_mlp [2, 256]" in capsys.readouterr().out

    assert main(["harvest", "verify", str(tmp_path)]) == 0
    shard = acts.shards[0].path
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert main(["harvest", "verify", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        "shards/00000.safetensors: not the bytes that were written"
    ]


def test_a_folder_with_an_image_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        sample_scene(seed).image.save(photos / f"{seed}.png")
    (photos / "1.png").write_bytes(b"no image")
    how = ["harvest", "toy:scenes-3l", "--data", str(photos), "--names", "resid_post:0", "--pos", "cls"]
    assert main([*how, "--out", str(tmp_path / "out")]) == 1
    assert "1.png" in capsys.readouterr().err
    assert main([*how, "--out", str(tmp_path / "out"), "--on-error", "skip"]) == 0
    printed = capsys.readouterr()
    assert "1 could not be read" in printed.err
    acts = open_harvest(tmp_path / "out")
    assert [line["path"] for line in acts.examples()] == ["0.png", "2.png"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["harvest", "info"], "folder"),
        (["harvest", "toy:scenes-3l"], "--data, --names, --out"),
        (["harvest", "toy:scenes-3l", "photos"], "photos"),
        (["harvest", "top", "toy:scenes-3l"], "--name"),
        (["harvest", "top", "toy:scenes-3l", "--name", "resid_post:1"], "--data"),
    ],
)
def test_what_is_missing_is_named(changed: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(changed) != 0
    assert said in " ".join(capsys.readouterr().err.split()).replace("FOLDER", "folder")


def test_a_set_that_datasets_does_not_find(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that library raises is one line, and not an error of Prisma's code."""
    # Without a network it tries again for half a minute.
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_HUB_OFFLINE", True)
    assert main(words(tmp_path, "--data", "hf:no-such-set-anywhere")) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "library datasets raised" in said
    assert "this is a bug" not in said


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--data", "samples:none", "samples:N"),
        ("--data", "nowhere", "'nowhere'"),
        ("--names", "resid_pots", "resid_pots"),
        ("--dtype", "int8", "'bfloat16', 'float16' or 'float32'"),
        ("--on-error", "ignore", "'ignore'"),
        ("--pos", "clss", "clss"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path, option, value)) == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_set_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [sample_scene(seed).image for seed in range(3)], "label": [4, 5, 6]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    how = ["harvest", "toy:scenes-3l", "--data", str(tmp_path / "saved"), "--names", "resid_post:0"]
    assert main([*how, "--out", str(tmp_path / "out")]) == 0
    assert [line["label"] for line in open_harvest(tmp_path / "out").examples()] == [4, 5, 6]


def test_every_source_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder, tar shards by glob and by braces, a split of a named set: the same images give the same numbers."""
    photos, shards = tmp_path / "photos", tmp_path / "shards"
    photos.mkdir()
    shards.mkdir()
    for seed in range(4):
        sample_scene(seed).image.save(photos / f"{seed}.png")
    for shard in range(2):
        with tarfile.open(shards / f"part-{shard:03d}.tar", "w") as tar:
            for seed in (2 * shard, 2 * shard + 1):
                tar.add(photos / f"{seed}.png", f"{seed}.png")
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, object]]:
        asked.append((name, split))
        return [{"image": photos / f"{seed}.png", "label": seed} for seed in range(4)]

    monkeypatch.setattr(options, "_datasets", lambda: SimpleNamespace(load_dataset=load_dataset))
    read: dict[str, torch.Tensor] = {}
    for at, data in enumerate(
        (
            str(photos),
            f"{shards}/*.tar",
            f"{shards}/part-{{000..001}}.tar",
            str(shards),
            "hf:acme/set:validation",
            "hf:one",
        )
    ):
        out = tmp_path / str(at)
        how = ["--names", "resid_post:1", "--pos", "cls", "--dtype", "float32", "--out", str(out)]
        assert main(["harvest", "toy:scenes-3l", "--data", data, *how]) == 0, capsys.readouterr().err
        acts = open_harvest(out)
        read[data] = acts.read(acts.names[0], 0, 4)
    assert all(torch.equal(each, read[str(photos)]) for each in read.values())
    assert asked == [("acme/set", "validation"), ("one", "train")]


def test_videos_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    av = pytest.importorskip("av")
    films = tmp_path / "films" / "left"
    films.mkdir(parents=True)
    for index in range(2):
        with av.open(str(films / f"{index}.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
            for frame in range(12):
                pixels = np.random.default_rng(20 * index + frame).integers(0, 256, (48, 48, 3)).astype(np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
    how = ["--data", str(films.parent), "--names", "resid_post:0", "--dtype", "float32", "--out", str(tmp_path / "out")]
    assert main(["harvest", "toy:motion", *how]) == 0, capsys.readouterr().err
    acts = open_harvest(tmp_path / "out")
    lines = [(line["path"], line["label"]) for line in acts.examples()]
    assert lines == [("left/0.mp4", "left"), ("left/1.mp4", "left")]
    model = prisma.load("toy:motion")
    _, cache = model.run_with_cache(model.preprocess(str(films / "1.mp4")), names=acts.names)
    assert torch.allclose(acts.example(1, acts.names[0]), cache[acts.names[0]][0], atol=1e-5)
    assert acts.layout is not None
    assert acts.layout.frames > 1
