"""Weights that are no weights, through every source that reads files; and how training's own forms of files load."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sources import SOURCES, Written
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError, LoadError

for library in ("timm", "open_clip", "transformers"):
    pytest.importorskip(library, reason=f"{library} is not installed")


@pytest.fixture(params=SOURCES)
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    """A small model as files of each source."""
    return SOURCES[request.param](tmp_path)


def middle(state: dict[str, Tensor]) -> str:
    """Return the name of a matrix in a block."""
    return next(name for name, x in state.items() if "1." in name and x.ndim >= 2)


NO_NUMBERS = r"holds numbers of another kind: .* expected real|holds weights that are no real numbers"
BROKEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "whole": (lambda x: (x * 100).to(torch.int64), NO_NUMBERS),
    "bytes": (lambda x: (x * 100).to(torch.int8), NO_NUMBERS),
    "eight bits": (lambda x: x.to(torch.float8_e4m3fn), NO_NUMBERS),
    "logical": (lambda x: x > 0, NO_NUMBERS),
    "complex": (lambda x: x.to(torch.complex64), NO_NUMBERS),
    "one NaN": (lambda x: x.flatten().index_fill(0, torch.tensor(3), torch.nan).view(x.shape), "NaN or infinite"),
    "infinite": (lambda x: x / 0, "NaN or infinite"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_are_no_numbers(written: Written, kind: str) -> None:
    spoil, told = BROKEN[kind]
    written.load()  # as it is
    name = middle(written.state)
    written.save({**written.state, name: spoil(written.state[name])})
    with pytest.raises(LoadError, match=told):
        written.load()


def test_every_weight_of_a_kind(written: Written) -> None:
    written.save({name: x.to(torch.complex64) for name, x in written.state.items()})
    with pytest.raises(LoadError, match=NO_NUMBERS):
        written.load()


def test_a_block_far_away(written: Written) -> None:
    """One more tensor, called as one of the billionth block: nothing is made for those in between."""
    name = middle(written.state)
    far = name.replace("1.", "1000000000.", 1)
    written.save({**written.state, far: written.state[name].clone()})
    with pytest.raises(LoadError, match=r"1000000000|extra"):
        written.load()


def test_nothing_is_saved_that_is_no_model(tmp_path: Path) -> None:
    model: Any = prisma.load("toy:scenes-3l")
    with torch.no_grad():
        model.blocks[0].attn.W_O[0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite, in .*Nothing is saved"):
        prisma.save(model, tmp_path / "saved")
    assert not (tmp_path / "saved" / "spec.json").exists()


# ------------------------------------------------------------ training's own forms

FORMS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "parallel": lambda state: {f"module.{name}": x for name, x in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": x for name, x in state.items()},
    "both": lambda state: {"model": {f"module._orig_mod.{name}": x for name, x in state.items()}, "epoch": 3},
    "lightning": lambda state: {"state_dict": {f"model.{name}": x for name, x in state.items()}, "loops": {}},
    "averaged": lambda state: {"n_averaged": torch.tensor(3)} | {f"module.{name}": x for name, x in state.items()},
    "with arguments": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=1), "best": 0.5},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["timm", "dino", "toy", "open_clip"])
def test_forms_of_training(source: str, form: str, tmp_path: Path) -> None:
    written = SOURCES[source](tmp_path)
    plain = dict(written.load().named_parameters())
    written.save(FORMS[form](written.state))
    again = dict(written.load().named_parameters())
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("source", ["timm", "dino", "toy", "open_clip"])
def test_one_of_several_is_asked_for(source: str, tmp_path: Path) -> None:
    written = SOURCES[source](tmp_path)
    averaged = {name: x * 2 if x.is_floating_point() else x for name, x in written.state.items()}
    written.save({"state_dict": written.state, "state_dict_ema": averaged})
    plain = dict(written.load(key="state_dict").named_parameters())
    doubled = dict(written.load(key="state_dict_ema").named_parameters())
    assert all(torch.equal(doubled[name], 2 * tensor) for name, tensor in plain.items())
    with pytest.raises((LoadError, InputError), match=r"state_dict, state_dict_ema.*[Gg]ive key="):
        written.load()
    with pytest.raises((LoadError, InputError), match=r"ema.*[Gg]ive key="):
        written.load(key="ema")


def test_a_key_goes_with_a_file() -> None:
    with pytest.raises(InputError, match=r"key='model'.*@CHECKPOINT"):
        prisma.load("timm:vit_tiny_patch16_224", pretrained=False, key="model")
    with pytest.raises(InputError, match=r"key='model'.*@FILE"):
        prisma.load("open_clip:ViT-B-32", pretrained=False, key="model")


def test_weights_listed_elsewhere_are_not_read(tmp_path: Path) -> None:
    """A list of files of weights names those beside it, and none above."""
    (tmp_path / "model").mkdir()
    written = SOURCES["hf"](tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(written.state, "../secret.safetensors")}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match=r"secret\.safetensors"):
        written.load()


def test_a_tensor_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    written = SOURCES["hf"](tmp_path)
    names = sorted(written.state)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    for file, held in files.items():
        save_file({name: written.state[name] for name in held}, tmp_path / file, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    model = written.load()
    again = {name: written.state[name] for name in names[5:]} | {names[0]: written.state[names[0]] + 1}
    save_file(again, tmp_path / "model-00002-of-00002.safetensors", {"format": "pt"})
    with pytest.raises(LoadError, match=f"{names[0]}, and another of the files too"):
        written.load()
    assert isinstance(model, prisma.HookedViT)


def test_quantised_weights_are_named(tmp_path: Path) -> None:
    written = SOURCES["hf"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"quantised weights \(bitsandbytes\)"):
        written.load()
