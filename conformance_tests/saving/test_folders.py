"""Folders of models: where they may be written, and what is said of damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile import truncate
from safetensors.torch import load_file, save_file
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, LoadError
from prisma_core.saving.folder import SPEC, WEIGHTS


@pytest.fixture
def folder(vit: HookedViT, tmp_path: Path) -> Path:
    return prisma.save(vit, tmp_path / "saved")


def _edited(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> str:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    return f"file:{folder}"


def test_a_file_where_a_folder_should_be(vit: HookedViT, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(LoadError, match=r"folder.*taken"):
            prisma.save(vit, path)
    assert (tmp_path / "taken").read_text() == "mine"


def test_the_folder_above_a_model(vit: HookedViT, tmp_path: Path) -> None:
    for name in ("aaa", "model"):
        prisma.save(vit, tmp_path / name)
    with pytest.raises(LoadError, match=rf"spec\.json.*file:{tmp_path / 'model'}"):
        prisma.load(f"file:{tmp_path}")


def test_local_models_make_no_network_call(no_network: None, vit: HookedViT, image: Tensor, tmp_path: Path) -> None:
    loaded = prisma.load(f"file:{prisma.save(vit, tmp_path)}")
    assert torch.equal(loaded(image), vit(image))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda t: t.pop("head.bias"), "missing head.bias"),
        (lambda t: t.update(spare=torch.ones(2)), "extra spare"),
        (lambda t: t.update({"head.bias": torch.ones(9)}), r"head.bias has shape \[9\], expected \[7\]"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, edit: Callable[[dict[str, Tensor]], object], problem: str) -> None:
    with pytest.raises(LoadError, match=problem):
        prisma.load(_edited(folder, edit))


def test_a_truncated_folder(folder: Path) -> None:
    truncate(folder / WEIGHTS)
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        prisma.load(f"file:{folder}")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"spec": 3}', '{"spec": {"d_model": 0}}'],
)
def test_a_spec_that_describes_no_model(folder: Path, text: str) -> None:
    (folder / SPEC).write_text(text)
    with pytest.raises(LoadError, match=r"spec\.json"):
        prisma.load(f"file:{folder}")


def test_a_spec_with_an_unknown_field(folder: Path) -> None:
    text = json.loads((folder / SPEC).read_text())
    text["spec"]["colour"] = "green"
    (folder / SPEC).write_text(json.dumps(text))
    with pytest.raises(LoadError, match="colour"):
        prisma.load(f"file:{folder}")


def test_a_folder_with_a_file_missing(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(LoadError, match=r"model\.safetensors.*prisma\.save"):
        prisma.load(f"file:{folder}")
