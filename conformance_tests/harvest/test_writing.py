"""What a harvest holds: the numbers of ``run_with_cache``, the lines, the manifest, the name."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_harvest import cat, harvest, open_harvest, verify, weights_hash

from prisma_core import HookedDual, HookedViT, InputError, LoadError, UnknownName
from prisma_core.plugin import DualSpec, TextSpec

NAMES = [("resid_post", 0), ("z", 1), ("mlp.hook_post", 1)]
FULL = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"]


def pixels_of(model: HookedViT, folder: Path) -> torch.Tensor:
    files = sorted(folder.rglob("*.png"))
    return torch.cat([model.preprocess(path) for path in files]).double()


@pytest.mark.parametrize("pos", [None, "cls", "patches", [0, -1], slice(2, 5)])
@pytest.mark.parametrize(("dtype", "workers"), [("float32", 0), ("bfloat16", 2)])
def test_the_numbers_are_those_of_run_with_cache(
    model: HookedViT, photos: Path, tmp_path: Path, pos: object, dtype: str, workers: int
) -> None:
    acts = harvest(model, photos, NAMES, out=tmp_path / "out", pos=pos, dtype=dtype, batch=4, shard=8, workers=workers)
    pixels = pixels_of(model, photos)
    assert len(acts) == 26
    assert acts.names == FULL
    for name in FULL:
        parts = [model.run_with_cache(part, names=[name], pos=pos)[1][name] for part in pixels.split(4)]
        expected = torch.cat(parts).to(getattr(torch, dtype))
        assert torch.equal(acts.read(name, 0, 26), expected)
        assert torch.equal(acts.example(-1, name), expected[-1])
    assert not torch.equal(acts.example(0, FULL[0]), acts.example(1, FULL[0]))


def test_lines_and_manifest_say_what_there_is(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    model.reference = "test:planted"
    acts = harvest(model, photos, NAMES, out=tmp_path / "out", pos="cls", batch=4)
    lines = list(acts.examples())
    files = sorted(photos.rglob("*.png"))
    assert [line["path"] for line in lines] == [path.relative_to(photos).as_posix() for path in files]
    assert [line["label"] for line in lines] == [path.parent.name for path in files]
    assert [line["sha256"] for line in lines] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert [line["example"] for line in lines] == [line["source"] for line in lines] == list(range(26))
    facts = json.loads((acts.path / "manifest.json").read_text())
    assert facts["schema_version"] == 1
    assert facts["model"]["reference"] == "test:planted"
    assert facts["model"]["weights"] == weights_hash(model)
    assert [point["shape"] for point in facts["points"]] == [[1, 24], [1, 3, 8], [1, 5]]
    assert facts["points"][1]["axes"] == "pos head d_head"
    assert (facts["pos"], facts["layout"]["rows"], facts["preprocess"]["size"]) == ("cls", 3, [6, 6])
    assert acts.tokens_of(acts.names[0]) == ["cls"]
    assert acts.positions_of(acts.names[0]) == [0]


def test_the_name_is_the_hash_of_the_manifest_file(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    acts = harvest(model, photos, NAMES, out=tmp_path / "out", batch=4)
    printed = subprocess.run(["sha256sum", acts.path / "manifest.json"], capture_output=True, text=True, check=True)
    assert acts.path.name == printed.stdout[:16]


def test_whatever_the_bytes_depend_on_is_in_the_name(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    def name(**changes: object) -> str:
        how = {"names": NAMES, "pos": None, "dtype": "float32", "batch": 4, "shard": 8, **changes}
        return harvest(model, photos, how.pop("names"), out=tmp_path / "out", **how).path.name  # type: ignore[arg-type]

    first = name()
    assert name(workers=1) == name(on_error="skip") == first
    others = [name(names=NAMES[:1]), name(pos="cls"), name(dtype="float16"), name(batch=2), name(shard=4)]
    others += [name(limit=5), name(data_name="mine"), name(note="a note")]
    with torch.no_grad():
        model.blocks[0].attn.W_Q[0, 0, 0] += 1
    others.append(name())
    (photos / "cats" / "01.png").write_bytes((photos / "cats" / "02.png").read_bytes() + b"longer")
    others.append(name())
    assert len({first, *others}) == len(others) + 1


def test_a_whole_harvest_is_returned_and_never_written_again(
    model: HookedViT, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = harvest(model, photos, NAMES, out=tmp_path / "out", batch=4)
    times = {path: path.stat().st_mtime_ns for path in acts.path.rglob("*")}

    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("a pass")

    monkeypatch.setattr("prisma_harvest.passes.Pass.activations", refuse)
    again = harvest(model, photos, NAMES, out=tmp_path / "out", batch=4)
    assert again.path == acts.path
    assert {path: path.stat().st_mtime_ns for path in acts.path.rglob("*")} == times


def test_images_that_cannot_be_read_stop_or_are_skipped_and_listed(
    model: HookedViT, photos: Path, tmp_path: Path
) -> None:
    bad = sorted(photos.rglob("*.png"))[5]
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(InputError, match=rf"Image 5 \({bad.parent.name}/{bad.name}\).*on_error='skip'"):
        harvest(model, photos, NAMES, out=tmp_path / "out", batch=2, shard=4)
    acts = harvest(model, photos, NAMES, out=tmp_path / "out", batch=2, shard=4, on_error="skip")
    assert len(acts) == 25
    (line,) = acts.skipped()
    assert (line["source"], line["path"]) == (5, f"{bad.parent.name}/{bad.name}")
    assert [line["source"] for line in acts.examples()] == [at for at in range(26) if at != 5]
    good = pixels_of_good(model, photos, bad)
    expected = model.run_with_cache(good[4:5], names=NAMES)[1][FULL[0]]
    assert torch.equal(acts.example(4, FULL[0]), expected[0].bfloat16())
    expected = model.run_with_cache(good[5:7], names=NAMES)[1][FULL[0]]
    assert torch.equal(acts.read(FULL[0], 5, 7), expected.bfloat16())


def pixels_of_good(model: HookedViT, folder: Path, bad: Path) -> torch.Tensor:
    files = [path for path in sorted(folder.rglob("*.png")) if path != bad]
    return torch.cat([model.preprocess(path) for path in files]).double()


def test_a_shard_of_which_no_image_can_be_read(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    for bad in sorted(photos.rglob("*.png"))[4:8]:
        bad.write_bytes(b"nothing")
    acts = harvest(model, photos, NAMES, out=tmp_path / "out", batch=2, shard=4, on_error="skip")
    assert [shard.n for shard in acts.shards] == [4, 0, 4, 4, 4, 4, 2]
    assert acts.read(FULL[1], 0, 22).shape == (22, 10, 3, 8)
    assert verify(acts.path) == []


def test_what_cannot_be_harvested_is_refused(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UnknownName, match="resid_post"):
        harvest(model, photos, "resid_pots", out=out)
    with pytest.raises(InputError, match="'bfloat16', 'float16' or 'float32'; got 'int8'"):
        harvest(model, photos, NAMES, out=out, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="folder of images"):
        harvest(model, tmp_path / "nowhere", NAMES, out=out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images in"):
        harvest(model, tmp_path / "empty", NAMES, out=out)
    with pytest.raises(InputError, match="No position"):
        harvest(model, photos, NAMES, out=out, pos=[10])
    with (
        model.hooks({("z", 0): lambda z, at: 0 * z}),
        pytest.raises(InputError, match=r"blocks\.0\.attn\.hook_z.*note="),
    ):
        harvest(model, photos, NAMES, out=out)
    with torch.no_grad():
        model.blocks[0].mlp.fc_out.weight.mul_(1e9)
    with pytest.raises(InputError, match=r"too large for float16.*bfloat16"):
        harvest(model, photos, NAMES, out=out, dtype="float16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_nan_is_written_and_said(model: HookedViT, photos: Path, tmp_path: Path, dtype: Any) -> None:
    """Numbers of -inf, as masked scores hold them, are no news; of float16 they are refused."""

    def broken(x: torch.Tensor, at: object) -> torch.Tensor:
        x[-1, 1] = torch.nan
        x[0, 0] = -torch.inf if dtype != "float16" else 0
        return x

    how: dict[str, Any] = {"note": "edited", "batch": 13, "shard": 13, "workers": 0, "dtype": dtype, "on_error": "skip"}
    (photos / "cats" / "00.png").write_bytes(b"no image")
    with (
        model.hooks({FULL[0]: broken}),
        pytest.warns(UserWarning, match=rf"{FULL[0]} is NaN or infinite for image 12 ") as told,
    ):
        acts = harvest(model, photos, NAMES[:1], out=tmp_path / "out", **how)
    assert len(told) == 1
    line = list(acts.examples())[11]
    assert f"({line['path']})" in str(told[0].message)
    assert torch.isnan(acts.example(11, FULL[0])[1]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_infinite_activations_are_said(model: HookedViT, photos: Path, tmp_path: Path, dtype: Any) -> None:
    """3.4e38 is a number in float32, and infinite in bfloat16, which keeps 8 digits."""

    def large(x: torch.Tensor, at: object) -> torch.Tensor:
        x[-1, 1] = 3.4e38 if dtype == "bfloat16" else torch.inf
        return x

    how: dict[str, Any] = {"note": "edited", "batch": 14, "workers": 0, "dtype": dtype}
    with model.hooks({FULL[0]: large}), pytest.warns(UserWarning, match=rf"{FULL[0]} is NaN or infinite for image"):
        harvest(model, photos, NAMES[:1], out=tmp_path / "out", **how)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_a_folder_that_no_disk_takes_is_told(model: HookedViT, photos: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="out= to be a path that the disk takes"):
        harvest(model, photos, NAMES, out=tmp_path / name)
    with pytest.raises(InputError, match="path= to be a path that the disk takes"):
        open_harvest(tmp_path / name)


def test_a_corrupt_shard_is_found(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    acts = harvest(model, photos, NAMES, out=tmp_path / "out", batch=4, shard=8)
    assert verify(acts.path) == verify(tmp_path / "out") == []
    shard = acts.shards[1].path
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert verify(acts.path) == ["shards/00001.safetensors: not the bytes that were written"]
    shard.unlink()
    assert len(problems := verify(acts.path)) == 1
    assert problems[0].startswith("shards/00001.safetensors: No such file")
    with pytest.raises(LoadError, match=r"00001\.safetensors.*verify"):
        acts.read(FULL[0], 0, 26)
    manifest = acts.path / "manifest.json"
    written = manifest.read_text()
    manifest.write_text(written.replace('"batch": 4', '"batch": 5'))
    with pytest.raises(LoadError, match=r"manifest\.json says something else than when it was written"):
        verify(acts.path)
    manifest.write_text(written)
    (acts.path / "notes.txt").write_text("mine")
    assert "notes.txt: is no part of the harvest" in verify(acts.path)


def test_a_newer_schema_and_other_folders_are_refused(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    acts = harvest(model, photos, NAMES, out=tmp_path / "out", batch=4)
    with pytest.raises(LoadError, match="holds no harvest"):
        open_harvest(photos)
    harvest(model, photos, NAMES, out=tmp_path / "out", batch=2)
    with pytest.raises(LoadError, match=acts.path.name):
        open_harvest(tmp_path / "out")
    manifest = acts.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 7'))
    with pytest.raises(LoadError, match=r"schema 7.*reads 1"):
        open_harvest(acts.path)


def test_two_as_one(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    cats, dogs = (
        harvest(model, photos / kind, NAMES, out=tmp_path / "out", batch=4, shard=4) for kind in ("cats", "dogs")
    )
    both = cat(cats, dogs)
    assert len(both) == len(cats) + len(dogs) == 26
    joined = torch.cat([each.read(FULL[0], 0, len(each)) for each in (cats, dogs)])
    assert torch.equal(both.read(FULL[0], 0, 26), joined)
    assert torch.equal(both.example(len(cats), FULL[0]), dogs.example(0, FULL[0]))
    assert [line["example"] for line in both.examples()] == list(range(26))
    assert sum(len(rows) for rows in both.rows(FULL[0], 7, shuffle=True, buffer=50)) == 26 * 10
    other = harvest(model, photos / "cats", NAMES, out=tmp_path / "out", batch=4, pos="cls")
    with pytest.raises(InputError, match="differ in points"):
        cat(cats, other)


def test_a_pair_of_towers_gives_the_vision_tower(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    text = TextSpec.plain(layers=1, n_classes=3, ln_final=None)
    pair = HookedDual(DualSpec(vision=model.spec, text=text)).double().eval()
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.3)
    pair.preprocess = model.preprocess
    names = ["vision.blocks.1.hook_resid_post", "vision.blocks.0.attn.hook_z"]
    acts = harvest(pair, photos, names, out=tmp_path / "out", pos="cls", batch=4, dtype="float32")
    assert acts.names == sorted(names)
    pixels = pixels_of(model, photos)[:4]
    _, cache = pair.vision.run_with_cache(pixels, names="resid_post", pos="cls")
    assert torch.equal(acts.read(names[0], 0, 4), cache["resid_post", 1].float())
    assert acts.manifest.model.tower == "vision."
    assert harvest(pair, photos, ("z", 0), out=tmp_path / "out", batch=4).names == names[1:]
    mixed = [names[0], ("z", 0), "vision.blocks.1.mlp.*pre"]  # with and without the prefix
    several = harvest(pair, photos, mixed, out=tmp_path / "out").names
    assert sorted(several) == [*sorted(names), "vision.blocks.1.mlp.hook_pre"]
    with pytest.raises(UnknownName, match=r"text\.blocks\.0"):
        harvest(pair, photos, "text.blocks.0.hook_resid_post", out=tmp_path / "out")
