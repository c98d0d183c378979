"""The command ``prisma patch``, offline on the bundled toy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_patch import patch_heads
from prisma_toy import sample_scene

import prisma_core as prisma
from prisma_core.cli.app import main

TOY = "toy:scenes-3l"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, paths = tmp_path_factory.mktemp("images"), list[str]()
    for name, seed in (("--clean", 0), ("--corrupt", 3)):
        path = folder / f"{seed}.png"
        sample_scene(seed).image.save(path)
        paths += [name, str(path)]
    return paths


def run(*words: str) -> int:
    return main(["patch", *words])


def test_json_holds_the_effects_of_the_function(
    images: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept, out = tmp_path / "kept.safetensors", tmp_path / "out.safetensors"
    words = [TOY, *images, "--json", "--out", str(out), "--resume", str(kept), "--metric", "purple circle, red circle"]
    assert run(*words) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    model = prisma.load(TOY)
    effects = patch_heads(model, *map(model.preprocess, images[1::2]), ("purple circle", "red circle")).sel(batch=0)
    torch.testing.assert_close(torch.tensor(said["values"]), effects.values)
    torch.testing.assert_close(prisma.Result.load(out).values, effects.values)
    assert said["axes"] == ["layer", "head"]
    assert said["top"][0]["place"] == list(effects.top(1)[0][0])
    assert (said["clean"], said["corrupt"]) == ("🟣 purple circle", "🔴 red circle")
    assert kept.is_file()


def test_the_table_is_layer_by_head_and_lists_what_does_not_fit(
    images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(TOY, *images) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[-3:]] == ["L0", "L1", "L2"]
    assert all(len(row) == 5 for row in rows[-4:] if row[0] != "layer")
    assert run(TOY, *images, "--at", "blocks.1.hook_resid_pre", "--over", "pos", "--top", "4") == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


BAD = {
    "class": (["--metric", "purpel circle"], "purple circle"),
    "file": (["--out", "effects.csv"], ".safetensors, got 'effects.csv'"),
    "text": (["--text", "a cat"], "--text"),
    "axis": (["--over", "layer neuron"], "d_mlp"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(images: list[str], capsys: pytest.CaptureFixture[str], case: str) -> None:
    words, fact = BAD[case]
    assert run(TOY, *images, *words) == 1
    told = capsys.readouterr()
    assert fact in told.err
    assert "Traceback" not in told.err
    assert told.out == ""
