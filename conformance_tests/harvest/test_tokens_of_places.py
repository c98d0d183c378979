"""The tokens of each hook point are those that it holds: all that were read, or the patches or class token alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prisma_harvest import Pass, harvest, top_examples
from prisma_harvest.options import read_source
from prisma_lens import probe_harvest
from prisma_sae import load, splice
from prisma_toy import sample_scene
from prisma_view import gallery
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError
from prisma_core.cli.app import main

EMBED, RESID = "hook_embed", "blocks.1.hook_resid_post"
FEATURES = f"{RESID}.sae.hook_features"
HOW: dict[str, Any] = {"preprocess": None, "batch": 3, "workers": 0}


@pytest.fixture
def scenes() -> tuple[Any, Any, Tensor]:
    torch.set_default_dtype(torch.float32)
    model = prisma.load("toy:scenes-3l")
    return model, load("scenes-3l"), model.preprocess([sample_scene(seed).image for seed in range(6)])


def test_patches_are_named_as_patches_at_a_place_without_the_class_token(scenes: Any, tmp_path: Path) -> None:
    """One patch of one image is planted: every reader says which."""
    model, _, images = scenes
    names = model.layout_for(images).token_names()
    assert names[0] == "cls"
    at = names.index("r3c5") - 1
    images[4] = images[0] = 0
    size = model.spec.embed.patch[0]
    images[4, :, 3 * size : 4 * size, 5 * size : 6 * size] = 3
    _, cache = model.run_with_cache(images, names=EMBED)
    direction = cache[EMBED][4, at] - cache[EMBED][0, at]
    acts = harvest(model, list(images), [EMBED, RESID], out=tmp_path, pos="cls", dtype="float32", **HOW)
    assert (acts.tokens_of(RESID), acts.positions_of(RESID)) == (["cls"], [0])
    assert acts.tokens_of(EMBED) == names[1:]
    assert acts.positions_of(EMBED) == list(range(1, len(names)))
    for source in (acts, Pass(model, list(images), [EMBED], **HOW)):
        best = top_examples(source, EMBED, 1, directions=direction[None])
        assert best.tensors["example"].item() == 4
        assert best.facts["tokens"][best.tensors["token"].item()] == "r3c5"
        assert best.facts["positions"][best.tensors["token"].item()] == names.index("r3c5")


@pytest.mark.parametrize(
    ("tokens", "first", "count"), [("patches", "r0c0", 144), ("cls", "cls", 1), ("all", "cls", 145)]
)
def test_features_of_a_coder_of_some_tokens_are_read_and_named(
    scenes: Any, tmp_path: Path, tokens: Any, first: str, count: int
) -> None:
    model, coder, images = scenes
    with splice(model, coder.with_facts(tokens=tokens)):
        _, cache = model.run_with_cache(images, names=FEATURES)
        acts = harvest(model, list(images), FEATURES, out=tmp_path, dtype="float32", note="coder", **HOW)
        best = top_examples(Pass(model, list(images), FEATURES, note="coder", **HOW), FEATURES, 1)
        labels = torch.arange(6) % 2
        labels, read = (labels, "cls") if tokens == "cls" else (labels[:, None].expand(-1, 144), "patches")
        probed = probe_harvest(acts, labels, FEATURES, tokens=read, control=False, epochs=1)
        pages = gallery(model, list(images), FEATURES, out=tmp_path / "pages", k=2, note="coder", **HOW)
    assert acts.tokens_of(FEATURES)[0] == best.facts["tokens"][0] == first
    assert len(acts.tokens_of(FEATURES)) == len(best.facts["tokens"]) == count
    rows = cache[FEATURES].flatten(0, 1)
    torch.testing.assert_close(torch.cat(list(acts.rows(FEATURES, 50))), rows, rtol=0, atol=1e-5)
    torch.testing.assert_close(best.values, rows.amax(0)[:, None], rtol=0, atol=1e-5)
    assert probed.values.shape == (1, 1)
    assert pages.units == 256


def test_a_search_of_patches_that_was_done_becomes_a_gallery(scenes: Any, tmp_path: Path) -> None:
    top = top_examples(Pass(scenes[0], read_source("samples:6", "toy:scenes-3l"), [EMBED], batch=3), EMBED, 2)
    top.save(tmp_path / "top.safetensors")
    out = ["--out", str(tmp_path / "pages"), "--no-open"]
    assert main(["gallery", str(tmp_path / "top.safetensors"), "--data", "samples:6", *out]) == 0


def test_a_coder_of_patches_stands_where_there_are_patches_alone(scenes: Any) -> None:
    model, coder, images = scenes
    with splice(model, coder.with_facts(hook=EMBED), force=True):
        _, cache = model.run_with_cache(images, names=["sae.input", "sae.features"])
    _, clean = model.run_with_cache(images, names=EMBED)
    assert torch.equal(cache[f"{EMBED}.sae.hook_input"], clean[EMBED])
    assert cache[f"{EMBED}.sae.hook_features"].shape == (6, 144, 256)


def test_options_that_there_are_not_are_told_with_the_nearest(scenes: Any, tmp_path: Path) -> None:
    model, _, images = scenes
    with pytest.raises(InputError, match=r"harvest takes no 'on_eror'.*on_error"):
        harvest(model, list(images), EMBED, out=tmp_path, on_eror="skip")
    with pytest.raises(InputError, match=r"gallery takes no 'limt'.*limit"):
        gallery(model, list(images), EMBED, out=tmp_path / "pages", limt=3)
    with pytest.raises(InputError, match=r"dataset takes no 'shufle'.*shuffle"):
        harvest(model, list(images), EMBED, out=tmp_path, **HOW).dataset(EMBED, 4, shufle=True)
    assert not (tmp_path / "pages").exists()
