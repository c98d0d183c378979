"""Small files that claim to be large, and facts of a saved model that contradict each other: refused before it is made.

A test that does not end, or is killed for memory, has failed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VARIANTS, build
from sources import CLIP, SOURCES
from torch import nn

import prisma_core as prisma
from prisma_core import LoadError, PluginError, PrismaError
from prisma_core.inputs import Preprocess
from prisma_core.toolbox.claims import check_claims, check_layers

BILLION, HUGE = 10**9, 10**18


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every plain value in a file of JSON."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*at, key))
    if not isinstance(value, dict | list):
        yield at


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    part = value
    for key in at[:-1]:
        part = part[key]
    part[at[-1]] = new
    return value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model, without the digest that would show any change of its weights."""
    model = build(scale=True, registers=2, rope=True).float()
    model.preprocess = Preprocess(size=(8, 12))
    prisma.save(model, tmp_path)
    write(tmp_path, {**facts(tmp_path), "weights": None})
    return tmp_path


def facts(folder: Path) -> Any:
    return json.loads((folder / "spec.json").read_text())


def write(folder: Path, facts: Any) -> str:
    (folder / "spec.json").write_text(json.dumps(facts))
    return f"file:{folder}"


# ------------------------------------------------------------ spec.json

WRONG: list[tuple[tuple[Any, ...], Any, str]] = [
    (("spec", "blocks", 0, "n_parallel"), BILLION, r"1000000001 blocks, and model\.safetensors holds \d+ tensors"),
    (("spec", "blocks", 1, "n_parallel"), HUGE, r"blocks, and model\.safetensors holds \d+ tensors"),
    (("spec", "d_model"), HUGE, "does not (describe a|fit the) model"),
    (("spec", "embed", "patch"), [-1, -1], r"embed\.patch\.0: .*greater than 0"),
    (("spec", "layout", "cls"), -1, r"layout\.cls: .*greater than or equal to 0"),
    (("spec", "image_size"), [5, -1], r"image_size\.1: .*greater than 0"),
    (("spec", "image_size"), [16, 12], r"the layout says \(2, 3\)"),
    (("spec", "blocks", 0, "attn", "scale"), float("nan"), "attn.scale: .*finite"),
    (("spec", "ln_final", "eps"), float("inf"), "ln_final.eps: .*finite"),
    (("labels",), 5, "labels"),
    (("labels",), "token", "labels"),
    (("labels",), ["a"], "7 classes and 1 labels"),
    (("labels",), [1, 2, 3, 4, 5, 6, 7], "labels.0"),
    (("frozen",), 5, "frozen"),
    (("frozen",), None, "frozen"),
    (("reference",), {"a": 1}, "reference"),
    (("preprocess", "size"), [BILLION, BILLION], r"size\.0: .*less than or equal to 16384"),
    (("preprocess", "size"), [0, 8], r"size\.0: .*greater than 0"),
    (("preprocess", "crop"), float("inf"), "crop: .*finite"),
    (("weights",), {"sha256": "x"}, "weights.sha256"),
    (("companions",), {"vision": {"source": "hf"}}, "companions"),
    (("companions",), {"tokenizer": {"source": "hf", "lost": "it is"}}, "companions.tokenizer"),
]


@pytest.mark.parametrize(("at", "value", "told"), WRONG)
def test_facts_that_are_wrong(at: tuple[Any, ...], value: Any, told: str, folder: Path) -> None:
    with pytest.raises(LoadError, match=told):
        prisma.load(write(folder, changed(facts(folder), at, value)))


def test_ten_thousand_blocks(folder: Path) -> None:
    whole = facts(folder)
    whole["spec"]["blocks"] *= 5000
    with pytest.raises(LoadError, match=r"describes 10000 blocks, and model\.safetensors holds \d\d tensors"):
        prisma.load(write(folder, whole))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "\0" * 100, '"' + "\\ud800" + '"', "1e999999"])
def test_a_file_that_is_hard_to_read(text: str, folder: Path) -> None:
    (folder / "spec.json").write_text(text)
    with pytest.raises(LoadError, match=r"spec\.json (is no readable JSON|holds a float)"):
        prisma.load(f"file:{folder}")


@pytest.mark.parametrize("name", ["plain", "side by side", "two heads", "mean of all, both norms"])
def test_every_fact_with_every_value(name: str, tmp_path: Path) -> None:
    """Each either is refused in words, or makes a model that runs or says in words why it does not."""
    model = build(**VARIANTS[name]).float()
    model.preprocess = Preprocess(size=(8, 12))
    prisma.save(model, tmp_path)
    whole = {**facts(tmp_path), "weights": None, "frozen": []}
    tried = 0
    for at in places(whole):
        for value in (BILLION, HUGE, -1, 0, float("nan"), None, "x", []):
            try:
                made: Any = prisma.load(write(tmp_path, changed(whole, at, value)))
                with torch.no_grad():
                    made(torch.zeros(1, 3, 8, 12))
                if made.preprocess is not None:
                    made.preprocess(torch.zeros(10, 10, 3))
            except PluginError:
                raise
            except PrismaError as error:
                assert len(str(error)) < 700  # noqa: PT017
            tried += 1
    assert tried > 400


# ------------------------------------------------------------ configurations


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("num_hidden_layers",), HUGE),
        (("num_hidden_layers",), BILLION),
        (("num_labels",), HUGE),
        (("hidden_size",), HUGE),
        (("hidden_size",), 1_500_000),
        (("intermediate_size",), 10**11),
        (("image_size",), 10**7),
        (("num_attention_heads",), 0),
        (("patch_size",), 0),
        (("backbone_layers",), [BILLION]),
    ],
)
def test_configurations_of_transformers(at: tuple[Any, ...], value: Any, pretrained: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    written = SOURCES["hf"](tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), at[0]: value}
    config.pop("id2label", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        LoadError, match=r"says .*, and|describes a model of|cannot be made of it|does not fit|configuration"
    ):
        written.load(pretrained=pretrained)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("vision_cfg", "layers"), BILLION),
        (("text_cfg", "layers"), HUGE),
        (("vision_cfg", "width"), 10**7 * 16),
        (("text_cfg", "context_length"), 10**7),
        (("text_cfg", "vocab_size"), 10**12),
        (("vision_cfg", "image_size"), 10**8),
        (("vision_cfg", "layers"), []),
        (("embed_dim",), "many"),
    ],
)
def test_configurations_of_open_clip(at: tuple[Any, ...], value: Any, pretrained: bool, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    written = SOURCES["open_clip"](tmp_path)
    (tmp_path / "clip.json").write_text(json.dumps({"model_cfg": changed(CLIP, at, value)}))
    with pytest.raises(LoadError, match=r"says .*, and|describes a model of|cannot build the configuration"):
        written.load(pretrained=pretrained)


@pytest.mark.parametrize("field", ["size", "mean", "std", "resize_mode"])
def test_what_open_clip_says_of_images(field: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    written = SOURCES["open_clip"](tmp_path)
    broken = {"size": [0, -1], "mean": ["x", 0, 0], "std": [0, 1, 1], "resize_mode": "no such way"}
    (tmp_path / "clip.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": {field: broken[field]}}))
    if field == "size":
        assert written.load().preprocess.size == (16, 16)  # of the model, which has one
        return
    with pytest.raises(LoadError, match="Images cannot be prepared as"):
        written.load()


# ------------------------------------------------------------ the checks by themselves


def test_layers_are_counted_against_the_file() -> None:
    held = {str(index): torch.zeros(1) for index in range(600)}
    for config in ({"num_hidden_layers": 600}, {"depths": [2, 600]}, {"layers": 12, "block_size": BILLION}):
        check_layers(config, held, "config.json")
    check_layers({"text_config": {"n_layer": 512}, "num_labels": 21_843}, None, "config.json")
    for config, told in (
        ({"a": [{"encoder_layers": 601}]}, r"config\.json says encoder_layers=601, and its file has 600 tensors"),
        ({"depths": [2, 601]}, "depths=601"),
    ):
        with pytest.raises(LoadError, match=told):
            check_layers(config, held, "config.json")
    with pytest.raises(LoadError, match="depth=513, and at most 512 are made"):
        check_layers({"depth": 513}, None, "config.json")


def test_a_model_is_no_larger_than_its_file_or_the_machine() -> None:
    with torch.device("meta"):
        small, large = nn.Linear(10, 10), nn.Linear(10_000, 10_000)
        endless = nn.Linear(10**9, 10**9)
    held = dict(small.named_parameters())
    check_claims(small, held, "config.json")
    check_claims(large, None, "config.json")
    with pytest.raises(LoadError, match=r"a model of 100,010,000 numbers, and its file holds 110\."):
        check_claims(large, held, "config.json")
    with pytest.raises(LoadError, match=r"a model of \d+ GiB; this machine has \d+\."):
        check_claims(endless, None, "config.json")
