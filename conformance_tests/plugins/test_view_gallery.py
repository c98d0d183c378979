"""Galleries: which images, which patches are lit, what units write; held against the planted circuit."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import prisma_view
import pytest
import torch
from PIL import Image
from planted import ANSWER, READS, marked, planted
from planted_dual import WORDS, planted_dual
from prisma_harvest import Pass, harvest, top_examples
from prisma_view.gallery_files import data_folder

from prisma_core import HookedModel, InputError, LoadError, Result, UnknownName
from prisma_core.cli.app import main

POST, RESID, Z = "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
HOW: dict[str, Any] = {"preprocess": None, "batch": 4, "workers": 0, "progress": False}


def images(n: int = 23) -> list[Any]:
    return [(marked(1 - seed % 3, seed)[0], f"<i>{seed}</i>") for seed in range(n)]


def script(path: Path) -> Any:
    """Return the data of a script that hands them to the page."""
    text = path.read_text(encoding="utf-8")
    return json.loads("[" + text[text.index("(") + 1 : text.rindex(")")] + "]")[-1]


def units_of(page: Path) -> list[dict[str, Any]]:
    return [unit for path in sorted(data_folder(page).glob("units-*.js")) for unit in script(path)]


def index_of(page: Path) -> dict[str, Any]:
    return script(data_folder(page) / "index.js")


def activations(model: HookedModel, name: str) -> torch.Tensor:
    with torch.no_grad():
        parts = [model.run_with_cache(image[None], names=name)[1][name][0] for image, _ in images()]
    return torch.stack(parts).float()


def test_images_patches_and_histograms_are_those_of_the_activations(tmp_path: Path) -> None:
    model = planted(noise=0.3)
    page = prisma_view.gallery(model, images(), POST, out=tmp_path / "g", k=5, **HOW).path
    truth = activations(model, POST)  # [image token neuron]
    units = units_of(page)
    assert len(units) == truth.shape[2]
    for neuron, unit in enumerate(units):
        scores = truth[:, :, neuron]
        best = scores.amax(1).argsort(descending=True, stable=True)[:5].tolist()
        assert [each[4] for each in unit["top"]] == [f"<i>{at}</i>" for at in best]
        top = float(scores.max())
        for image, (_, value, place, spot, _, heat) in zip(best, unit["top"], strict=True):
            token = int(scores[image].argmax())
            assert value == pytest.approx(float(scores[image, token]), rel=1e-3)
            expected = [-1, -1, -1] if token == 0 else [0, *divmod(token - 1, 3)]
            assert spot == expected
            assert place == ("class token" if token == 0 else f"row {spot[1] + 1}, column {spot[2] + 1}")
            lit = np.frombuffer(base64.b64decode(heat), np.uint8)
            np.testing.assert_allclose(lit, 255 * (scores[image, 1:] / top).clip(0, 1).numpy(), atol=1)
        assert sum(unit["histogram"]) == scores.numel()
    assert index_of(page)["share"] == pytest.approx((truth > 0).float().mean((0, 1)).tolist(), abs=1e-3)


def test_images_at_which_a_unit_is_off_are_not_its_top_images(tmp_path: Path) -> None:
    sae = pytest.importorskip("prisma_sae")
    model, weights = planted(noise=0.3), torch.eye(24)[:2]
    middle = activations(model, RESID)[:, 1:, 1].amax(1).median()
    coder = sae.SparseCoder(
        sae.CoderFacts(kind="standard", d_in=24, d_sae=2, d_out=24, hook=RESID, tokens="patches"),
        {"W_enc": weights.T.contiguous(), "b_enc": torch.tensor([-1e3, -float(middle)]), "W_dec": weights},
    )
    page = prisma_view.gallery(model, images(), coder=coder, out=tmp_path / "g", k=23, **HOW).path
    off, rare = (each["top"] for each in units_of(page))
    assert off == []
    assert 0 < len(rare) < 23
    assert min(each[1] for each in rare) > 0


def test_small_images_are_the_images(tmp_path: Path) -> None:
    page = prisma_view.gallery(planted(), images(3), Z, over="head", out=tmp_path / "g", k=3, **HOW).path
    sheet = np.asarray(Image.open(data_folder(page) / "0000.jpg").convert("L"), dtype=float)
    assert sheet.shape == (128, 1024)
    for thumb, _, _, _, name, _ in units_of(page)[0]["top"]:
        pixels = images(3)[int(name[3:-4])][0]
        grey = (torch.tensor([0.299, 0.587, 0.114]).double() @ pixels.flatten(1)).numpy()
        small = Image.fromarray(sheet[:, 128 * thumb : 128 * (thumb + 1)]).resize((6, 6), Image.Resampling.BOX)
        assert np.corrcoef(np.asarray(small).ravel(), grey)[0, 1] > 0.99


def test_effects_are_those_of_writing_the_unit_at_every_token(tmp_path: Path) -> None:
    model = planted(noise=0.3)
    x = torch.stack([image for image, _ in images(8)])
    units = units_of(prisma_view.gallery(model, images(), POST, out=tmp_path / "g", k=2, **HOW).path)
    with torch.no_grad():
        logits = model(x)
        for neuron, unit in enumerate(units):
            written = model.blocks[1].mlp.W_out[neuron]
            change = (model.run_with_hooks(x, hooks={RESID: lambda stream, hook, w=written: stream + w}) - logits).mean(
                0
            )
            assert dict(unit["effects"]) == pytest.approx(
                dict(zip(model.labels, change.tolist(), strict=True)), rel=1e-3
            )


def test_effects_of_a_head_are_those_of_its_mean_output(tmp_path: Path) -> None:
    model = planted()
    units = units_of(prisma_view.gallery(model, images(), Z, over="head", out=tmp_path / "g", k=4, **HOW).path)
    best = top_examples(Pass(model, images(), [Z], preprocess=None, batch=4, workers=0), Z, 4, over="head")
    z = activations(model, Z)
    for head, unit in enumerate(units):
        mean = torch.stack(
            [z[e, t, head] for e, t in zip(best.tensors["example"][head], best.tensors["token"][head], strict=True)]
        ).mean(0)
        change = mean.double() @ model.blocks[1].attn.W_O[head] @ model.head.weight.T
        assert dict(unit["effects"]) == pytest.approx(dict(zip(model.labels, change.tolist(), strict=True)), rel=2e-3)
    assert max(units, key=lambda unit: abs(unit["effects"][0][1])) is units[READS[1]]


@pytest.mark.parametrize("ln_final", [False, True])
def test_words_are_those_that_the_unit_writes(tmp_path: Path, ln_final: bool) -> None:
    model = planted_dual(ln_final=ln_final)
    directions = torch.zeros(2, 24)
    directions[0, ANSWER], directions[1, ANSWER] = 1, -1
    how = {**HOW, "out": tmp_path / "g", "k": 2, "directions": directions, "words": list(WORDS)}
    page = prisma_view.gallery(model, images(), "blocks.1.hook_resid_post", **how)
    bright, dark = units_of(page.path)
    assert bright["words"][0][0] == dark["words"][-1][0] == "a bright mark"
    assert dark["words"][0][0] == bright["words"][-1][0] == "a dark mark"
    assert set(page.why) == {"effects on classes"}
    if not ln_final:
        vectors = model.encode_text(list(WORDS), normalize=True)
        vectors = vectors - vectors.mean(0)
        written = model.vision.head.weight[:, ANSWER]
        cosines = torch.cosine_similarity(vectors, written[None]).tolist()
        assert dict(bright["words"]) == pytest.approx(dict(zip(WORDS, cosines, strict=True)), abs=1e-3)


def test_similar_units_write_alike(tmp_path: Path) -> None:
    directions = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    directions[3] = 2 * directions[1] + 0.1 * directions[0]
    page = prisma_view.gallery(planted(), images(), RESID, directions=directions, out=tmp_path / "g", k=2, **HOW).path
    units = units_of(page)
    assert units[1]["similar"][0][0] == 3
    assert units[3]["similar"][0] == [
        1,
        pytest.approx(float(torch.cosine_similarity(directions[1], directions[3], dim=0)), abs=1e-3),
    ]
    assert all(unit not in [other for other, _ in each["similar"]] for unit, each in enumerate(units))


def test_numbers_of_the_stream_have_no_similar_ones(tmp_path: Path) -> None:
    made = prisma_view.gallery(planted(), images(), RESID, out=tmp_path / "g", k=2, **HOW)
    assert "right angles" in made.why["similar units"]
    assert "similar" not in units_of(made.path)[0]


def test_features_of_a_coder_are_units(tmp_path: Path) -> None:
    sae = pytest.importorskip("prisma_sae")
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(24, 6, generator=generator)
    coder = sae.SparseCoder(
        sae.CoderFacts(kind="standard", d_in=24, d_sae=6, d_out=24, hook=RESID, tokens="patches", labels={2: "a <b>"}),
        {"W_enc": weights, "b_enc": torch.zeros(6), "W_dec": weights.T.contiguous()},
    )
    model = planted(noise=0.3)
    page = prisma_view.gallery(model, images(), coder=coder, out=tmp_path / "g", k=3, **HOW).path
    scores = coder.encode(activations(model, RESID)[:, 1:])
    assert index_of(page)["largest"] == pytest.approx(scores.amax((0, 1)).tolist(), rel=1e-3)
    assert index_of(page)["names"] == ["", "", "a <b>", "", "", ""]
    units = units_of(page)
    assert all(spot[0] == 0 for unit in units for _, _, _, spot, _, _ in unit["top"])
    expected = weights[:, 2].double() @ model.head.weight.T
    assert dict(units[2]["effects"]) == pytest.approx(dict(zip(model.labels, expected.tolist(), strict=True)), rel=1e-3)


def test_a_search_that_was_done_is_taken_and_other_images_are_refused(tmp_path: Path) -> None:
    model = planted(noise=0.3)
    acts = harvest(model, images(), [POST], out=tmp_path / "h", preprocess=None, batch=4, workers=0)
    top = top_examples(acts, POST, 4)
    path = top.save(tmp_path / "top.safetensors")
    again = prisma_view.gallery(model, images(), POST, top=Result.load(path), out=tmp_path / "a", k=3, **HOW).path
    fresh = prisma_view.gallery(model, images(), POST, out=tmp_path / "b", k=3, **HOW).path
    for one, other in zip(units_of(again), units_of(fresh), strict=True):
        assert [each[4] for each in one["top"]][:1] == [each[4] for each in other["top"]][:1]
        assert len(one["top"]) == 3
    others = [(image.flip(-1) + 1, label) for image, label in images()]
    with pytest.raises(InputError, match="scores differ"):
        prisma_view.gallery(model, others, POST, top=top, out=tmp_path / "c", **HOW)
    with pytest.raises(InputError, match=r"there are 3\b"):
        prisma_view.gallery(model, images(3), POST, top=top, out=tmp_path / "c", **HOW)
    with pytest.raises(InputError, match="of 5 units"):
        prisma_view.gallery(model, images(), RESID, top=top, out=tmp_path / "c", **HOW)


def test_a_video_shows_the_frame_of_the_top_token(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'prisma-interp[hf]'")
    import prisma_core as prisma

    config = transformers.VideoMAEConfig(
        image_size=32, patch_size=16, num_frames=8, tubelet_size=2, hidden_size=24, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = prisma.adapt(transformers.VideoMAEForVideoClassification(config).eval())
    videos = torch.randn(4, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.1
    for frame in range(8):
        videos[:, frame, :, :, 4 * frame : 4 * frame + 4] += 3
    made = prisma_view.gallery(model, list(videos), ("mlp.hook_post", 0), out=tmp_path / "g", k=2, **HOW)
    sheet = np.asarray(Image.open(data_folder(made.path) / "0000.jpg").convert("L"), dtype=float)
    frames = set()
    for unit in units_of(made.path):
        for thumb, _, place, (frame, _, _), _, _ in unit["top"]:
            row, column = divmod(thumb, 8)
            bright = (
                sheet[128 * row : 128 * (row + 1), 128 * column : 128 * (column + 1)].mean(0).reshape(8, 16).mean(1)
            )
            assert int(bright.argmax()) == 2 * frame
            assert place.startswith(f"frame {frame + 1}, row ")
            frames.add(frame)
    assert len(frames) > 1


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = planted()
    with pytest.raises(InputError, match="stream"):
        prisma_view.gallery(model, iter(images()), POST, out=tmp_path / "g", **HOW)
    with pytest.raises(InputError, match="reads no texts"):
        prisma_view.gallery(model, images(), POST, words=["a cat"], out=tmp_path / "g", k=1, **HOW)
    with pytest.raises(InputError, match="hook point"):
        prisma_view.gallery(model, images(), out=tmp_path / "g", **HOW)
    with pytest.raises(UnknownName):
        prisma_view.gallery(model, images(), ("mlp.hook_psot", 1), out=tmp_path / "g", **HOW)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        prisma_view.gallery(model, images(), POST, out=tmp_path / "full", k=1, **HOW)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("step", ["open", "replace"])
def test_a_gallery_that_is_stopped_half_way_leaves_the_old_one(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    made = prisma_view.gallery(planted(), images(), RESID, out=tmp_path / "g", k=2, **HOW)
    files = {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(*{"open": (Path, "write_text", full), "replace": (os, "replace", full)}[step])
        with pytest.raises(LoadError, match="No space left on device"):
            prisma_view.gallery(planted(), images(9), RESID, out=tmp_path / "g", k=2, **HOW)
    assert {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()} == files
    assert units_of(made.path)


def test_a_new_gallery_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    many = torch.randn(120, 24, generator=torch.Generator().manual_seed(0))
    prisma_view.gallery(planted(), images(), RESID, directions=many, out=tmp_path / "g", k=2, **HOW)
    assert len(list((tmp_path / "g").glob("data-*/units-*.js"))) == 3
    made = prisma_view.gallery(planted(), images(), RESID, directions=many[:2], out=tmp_path / "g", k=2, **HOW)
    assert [path.name for path in sorted((tmp_path / "g").glob("data-*/*.js"))] == ["index.js", "units-0000.js"]
    assert len(list((tmp_path / "g").iterdir())) == 2
    assert made.units == 2
    assert repr(made).startswith("Gallery(2 units, ")


def test_the_command_takes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "g")
    options = ["--data", "samples:12", "--out", out, "-k", "3", "--no-open"]
    assert main(["gallery", "toy:scenes-3l", "--name", "z:2", "--heads", *options]) == 0
    assert str(tmp_path / "g" / "index.html") in capsys.readouterr().out.replace("\n", "")
    assert index_of(tmp_path / "g" / "index.html")["kind"] == "head"
    assert main(["gallery", "toy:scenes-3l", "--coder", "scenes-3l", *options]) == 0
    index = index_of(tmp_path / "g" / "index.html")
    assert (index["kind"], index["n"], index["seen"]) == ("feature", 256, 12)
    assert any("ladybird" in name for name in index["names"])


def test_the_command_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gallery", "toy:scenes-3l", "--name", "z:2"]) == 1
    assert "--data" in capsys.readouterr().err


def test_the_command_takes_a_harvest_and_a_search_that_was_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, options = ["--data", "samples:12"], ["--no-open", "-k", "3"]
    places = ["--name", "resid_post:1", "--pos", "patches"]
    assert main(["gallery", "toy:scenes-3l", "--coder", "scenes-3l", "--out", "fresh", *data, *options]) == 0
    harvested = ["--names", "resid_post:1", "--names", "z:2", "--pos", "patches", "--dtype", "float32", "--out", "h"]
    assert main(["harvest", "write", "toy:scenes-3l", *data, *harvested]) == 0
    assert main(["gallery", "h", "--coder", "scenes-3l", "--out", "of-harvest", *data, *options]) == 0
    searched = [*places, "--coder", "scenes-3l", "-k", "5", "--out", "top.safetensors"]
    assert main(["harvest", "top", "toy:scenes-3l", *data, *searched]) == 0
    assert main(["gallery", "top.safetensors", "--coder", "scenes-3l", "--out", "of-file", *options]) == 0
    fresh, of_harvest, of_file = (index_of(tmp_path / out / "index.html") for out in ("fresh", "of-harvest", "of-file"))
    assert max(fresh["largest"]) > 1
    assert of_harvest["largest"] == pytest.approx(fresh["largest"], rel=1e-3, abs=1e-4)
    assert of_file == fresh
    capsys.readouterr()
    assert main(["gallery", "h", "--out", "x", *data, *options]) == 1
    assert "blocks.1.hook_resid_post, blocks.2.attn.hook_z" in capsys.readouterr().err.replace("\n", " ")
    assert main(["gallery", "top.safetensors", "--out", "x", *options]) == 1
    assert "--coder" in capsys.readouterr().err


def test_one_unit_is_a_page_with_its_images_inside(tmp_path: Path) -> None:
    made = prisma_view.gallery(planted(noise=0.3), images(), POST, out=tmp_path / "g", k=5, **HOW)
    whole = units_of(made.path)
    for neuron in (0, len(whole) - 1):
        page = made.unit(neuron)
        inside = json.loads(page.html.split("const inside = ")[1].split(";\nprismaGallery")[0])
        assert inside["names"] == [str(neuron)]
        assert inside["largest"] == [index_of(made.path)["largest"][neuron]]
        (unit,) = inside["units"]
        assert [row[1:] for row in unit["top"]] == [row[1:] for row in whole[neuron]["top"]]
        assert unit["effects"] == whole[neuron]["effects"]
        (sheet,) = (Image.open(io.BytesIO(base64.b64decode(each.split(",")[1]))) for each in inside["sheets"])
        first = Image.open(data_folder(made.path) / "0000.jpg")
        thumb = whole[neuron]["top"][0][0]
        theirs = first.crop((128 * (thumb % 8), 128 * (thumb // 8), 128 * (thumb % 8) + 128, 128 * (thumb // 8) + 128))
        ours = np.asarray(sheet.crop((0, 0, 128, 128)), dtype=float)
        assert np.abs(ours - np.asarray(theirs, dtype=float)).mean() < 6
        assert "<i>" not in page.html.split("const inside = ")[1]
    assert 'srcdoc="&lt;!doctype html' in page._repr_html_()
    with pytest.raises(UnknownName, match=f"0 to {len(whole) - 1}"):
        made.unit(len(whole))
