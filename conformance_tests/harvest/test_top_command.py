"""``prisma harvest top``: what ``top_examples`` finds, for every kind of unit, from a harvest and from a pass."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_harvest import Pass, harvest, top_examples
from prisma_lens import logit_lens, probe
from prisma_sae import load, save
from prisma_toy import sample_scene
from safetensors.torch import save_file

import prisma_core as prisma
from prisma_core import InputError, Result
from prisma_core.cli.app import main

PLACE = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def _float32() -> None:
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for seed in range(9):
        path = folder / f"group-{seed % 2}" / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_scene(seed).image.save(path)
    return folder


@pytest.fixture
def acts(photos: Path, tmp_path: Path) -> Any:
    model = prisma.load("toy:scenes-3l")
    names = [("resid_post", 1), ("z", 2)]
    return harvest(model, photos, names, pos="patches", dtype="float32", batch=4, out=tmp_path / "harvests")


def asked(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["harvest", "top", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def same(result: Result, shown: dict[str, Any]) -> None:
    """Hold JSON against a result."""
    assert shown["units"]
    for row in shown["units"]:
        unit = row["unit"]
        assert [one["score"] for one in row["top"]] == pytest.approx(result.values[unit].tolist(), rel=1e-5, abs=1e-6)
        assert [one["example"] for one in row["top"]] == result.tensors["example"][unit].tolist()
        assert [one["place"] for one in row["top"]] == result.tensors["token"][unit].tolist()
        assert row["histogram"] == result.tensors["histogram"][unit].tolist()
        assert row["mean"] == pytest.approx(float(result.tensors["mean"][unit]), rel=1e-4, abs=1e-7)


def test_neurons_of_a_harvest(acts: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "top.safetensors"
    shown = asked(
        [str(acts.path), "--name", "resid_post:1", "-k", "3", "--unit", "17", "--unit", "5", "--out", str(out)], capsys
    )
    assert [row["unit"] for row in shown["units"]] == [17, 5]
    result = top_examples(acts, ("resid_post", 1), 3)
    same(result, shown)
    assert shown["edges"] == result.tensors["edges"].tolist()
    best = shown["units"][0]["top"][0]
    content = (photos / best["path"]).read_bytes()
    assert best["sha256"] == hashlib.sha256(content).hexdigest()
    value = acts.example(best["example"], PLACE)[best["place"], 17]
    assert best["score"] == pytest.approx(float(value))
    assert best["token"] == acts.tokens_of(acts.names[0])[best["place"]]
    saved = Result.load(out)
    assert torch.equal(saved.values, result.values)
    assert saved.facts["schema_version"] == 1
    assert saved.facts["layout"] == acts.layout.model_dump(mode="json")
    assert saved.facts["positions"] == acts.positions_of(acts.names[0])
    assert set(saved.facts["examples"]["0"]) == {"source", "path", "label", "sha256"}


def test_a_pass_finds_what_a_harvest_finds(acts: Any, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--name", "resid_post:1", "-k", "4", "--per", "patch", "--show", "128"]
    one = asked([str(acts.path), *how], capsys)
    two = asked(["toy:scenes-3l", "--data", str(photos), "--pos", "patches", "--batch", "4", *how], capsys)
    assert one["units"] == two["units"]
    assert two["data"]["root"] == str(photos)
    assert two["data"]["given"] == str(photos)
    assert one["data"]["root"] is None
    assert one["tokens"] == two["tokens"]


def test_samples_heads_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["toy:scenes-3l", "--data", "samples:6", "--name", "result:2", "--over", "head", "-k", "2"]
    shown = asked(words, capsys)
    assert shown["unit"] == "head"
    assert len(shown["units"]) == 4
    assert shown["units"][0]["top"][0]["path"].startswith("toy:scenes-3l sample ")
    scores = [row["top"][0]["score"] for row in shown["units"]]
    assert scores == sorted(scores, reverse=True)
    assert main(["harvest", "top", *words]) == 0
    printed = capsys.readouterr()
    assert shown["units"][0]["top"][0]["path"] in printed.out
    assert "6 images" in printed.err


def test_a_probe_and_rows(acts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = prisma.load("toy:scenes-3l")
    scenes = [sample_scene(seed) for seed in range(12)]
    batch = model.preprocess([scene.image for scene in scenes]), torch.arange(12) % 3
    fitted = probe(model, [batch], ("resid_post", 1), labels=["red", "green", "blue"], control=False)
    path = fitted.save(tmp_path / "probe.safetensors")
    weight = fitted.tensors[f"{PLACE}/weight"]
    shown = asked([str(acts.path), "--name", "resid_post:1", "--probe", str(path), "-k", "2"], capsys)
    assert {row["label"] for row in shown["units"]} == {"red", "green", "blue"}
    result = top_examples(acts, PLACE, 2, directions=weight, labels=["red", "green", "blue"])
    same(result, shown)
    named = asked([str(acts.path), "--name", "resid_post:1", "--probe", str(path), "--unit", "green"], capsys)
    assert [row["unit"] for row in named["units"]] == [1]

    save_file({"rows": weight.contiguous()}, tmp_path / "rows.safetensors")
    shown = asked(
        [str(acts.path), "--name", PLACE, "--directions", str(tmp_path / "rows.safetensors"), "-k", "2"], capsys
    )
    same(result, shown)
    assert main(["harvest", "top", str(acts.path), "--name", "z:2", "--probe", str(path)]) == 1
    assert "blocks.2.attn.hook_z" in capsys.readouterr().err


def test_features_of_a_sparse_coder(acts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coder = load("scenes-3l")
    resume = tmp_path / "search.safetensors"
    how = [str(acts.path), "--name", "resid_post:1", "--coder", "scenes-3l", "-k", "3"]
    shown = asked([*how, "--resume", str(resume)], capsys)
    result = top_examples(acts, PLACE, 3, encode=coder.encode)
    same(result, shown)
    best = shown["units"][0]
    row = acts.example(best["top"][0]["example"], PLACE)[best["top"][0]["place"]]
    assert best["top"][0]["score"] == pytest.approx(float(coder.encode(row)[best["unit"]]), rel=1e-4)
    assert any(row["label"] in coder.facts.labels.values() for row in shown["units"])
    assert asked([*how, "--resume", str(resume)], capsys)["units"] == shown["units"]

    wider = coder.with_facts(k=coder.facts.k + 1) if coder.facts.k else coder.with_facts(soft_cap=1.0)
    folder = save(wider, tmp_path / "wider")
    again = [*how[:3], "--coder", str(folder), "-k", "3", "--resume", str(resume)]
    assert main(["harvest", "top", *again]) == 1
    assert "another search" in capsys.readouterr().err


def test_a_coder_is_held_to_its_place(acts: Any, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["harvest", "top", str(acts.path), "--name", "z:2", "--coder", "scenes-3l"]) == 1
    said = capsys.readouterr().err
    assert PLACE in said
    assert "blocks.2.attn.hook_z" in said
    how = ["--data", str(photos), "--name", "resid_post:1", "--coder", "scenes-3l"]
    assert main(["harvest", "top", "toy:scenes-3l", *how]) == 1
    assert "'patches'" in capsys.readouterr().err
    assert main(["harvest", "top", "toy:scenes-reg", "--pos", "patches", *how]) == 1
    assert "weights" in capsys.readouterr().err


def test_texts_of_a_dual_encoder(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = prisma.load("toy:clip-scenes")
    texts = ["a red circle", "a blue square"]
    names = [("vision.resid_post", 2), "vision.hook_logits"]
    acts = harvest(
        model, photos, ["vision.blocks.2.hook_resid_post", "vision.hook_logits"], dtype="float32", out=tmp_path
    )
    assert len(names) == len(acts.names)
    how = [str(acts.path), "-k", "3", *(word for text in texts for word in ("--text", text))]
    images = model.preprocess([photos / line["path"] for line in acts.examples()])
    lens = logit_lens(model, images, texts).values[-1] / model.logit_scale.exp().detach()  # [batch pos text]
    shown = asked([*how, "--name", "vision.blocks.2.hook_resid_post"], capsys)
    assert {row["label"] for row in shown["units"]} == set(texts)
    for row in shown["units"]:
        one = row["top"][0]
        readings = lens[..., row["unit"]]
        assert one["score"] == pytest.approx(float(readings.max()), abs=1e-5)
        assert readings[one["example"], one["place"]] == pytest.approx(float(readings.max()), abs=1e-5)

    cosines = (model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T).detach()
    shown = asked([*how, "--name", "vision.hook_logits"], capsys)
    for row in shown["units"]:
        assert row["top"][0]["score"] == pytest.approx(float(cosines[:, row["unit"]].max()), abs=1e-5)
        assert row["top"][0]["example"] == int(cosines[:, row["unit"]].argmax())
    assert main(["harvest", "top", *how, "--name", "vision.hook_logits", "--model", "toy:scenes-3l"]) == 1
    assert "other weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--text", "a cat"], "dual encoder"),
        (["--over", "heads"], "'heads'"),
        (["--per", "token"], "'token'"),
        (["--out", "top.json"], ".safetensors"),
        (["--unit", "200"], "from 0 to 127"),
        (["--data", "samples:3"], "--data"),
        (["--coder", "scenes-3l", "--text", "a cat"], "--coder"),
        (["--directions", "lost.safetensors"], "lost.safetensors"),
    ],
)
def test_what_is_wrong_is_named(acts: Any, more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["harvest", "top", str(acts.path), "--name", "resid_post:1", *more]) == 1
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_plain_function_is_searched_but_not_resumed(acts: Any, tmp_path: Path) -> None:
    doubled = top_examples(acts, PLACE, 2, encode=lambda rows: 2 * rows[:, :3])
    plain = top_examples(acts, PLACE, 2)
    assert doubled.axes == ("feature", "rank")
    assert torch.equal(doubled.values, 2 * plain.values[:3])
    with pytest.raises(InputError, match="encode"):
        top_examples(acts, PLACE, 2, encode=lambda rows: rows, resume=tmp_path / "search.safetensors")
    with pytest.raises(InputError, match=r"\[2 128\].*\[256\]"):
        top_examples(acts, PLACE, 2, encode=lambda rows: rows.flatten())
    with pytest.raises(InputError, match="directions"):
        top_examples(acts, PLACE, 2, encode=lambda rows: rows, directions=torch.zeros(1, 128))


def test_a_spliced_coder_is_searched_in_a_pass(photos: Path) -> None:
    """Features as hook points: an open splice is said in ``note``."""
    from prisma_sae import splice

    model, coder = prisma.load("toy:scenes-3l"), load("scenes-3l")
    with splice(model, coder):
        run = Pass(model, photos, ["sae.features"], batch=4, workers=0, note="scenes-3l")
        spliced = top_examples(run, "sae.features", 3)
    expected = top_examples(
        Pass(model, photos, [PLACE], pos="patches", batch=4, workers=0), PLACE, 3, encode=coder.encode
    )
    assert spliced.values.shape == expected.values.shape
    assert torch.allclose(spliced.values, expected.values, atol=1e-5)
    assert torch.equal(spliced.tensors["positive"], expected.tensors["positive"])
