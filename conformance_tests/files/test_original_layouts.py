"""Checkpoints as their authors' savers write them: right numbers, or one sentence on how to come to them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core import LoadError, UnknownName

timm = pytest.importorskip("timm")
VIT: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5, "img_size": 16, "patch_size": 8}
IMAGE = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def state(seed: int = 0, before: str = "", inside: str = "") -> dict[str, Tensor]:
    tensors = vit(seed).state_dict()
    return {f"{before}{name.replace('blocks.0.', f'blocks.0.{inside}')}": each for name, each in tensors.items()}


def loaded(path: Path, **options: Any) -> Tensor:
    return prisma.load(f"timm:vit_tiny_patch16_224@{path}", **VIT, **options)(IMAGE)


@dataclasses.dataclass
class Hyperparameters:
    """Of somebody's training."""

    lr: float = 1.0


def trained() -> dict[str, Any]:
    """Return what stands beside the weights, as optimizers, schedulers and scalers leave it after a step."""
    model = vit(0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(IMAGE).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    args = argparse.Namespace(lr=1e-3, device="cuda", output_dir=Path("/x"), world_size=None)
    scaler = torch.amp.GradScaler("cpu").state_dict()
    return {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "scaler": scaler, "args": args}


MAE: Callable[[], Any] = lambda: {"model": state(), **trained(), "epoch": 399}  # noqa: E731
DEIT: Callable[[], Any] = lambda: {**MAE(), "model_ema": state(1)}  # noqa: E731
TIMM: Callable[[], Any] = lambda: {"state_dict": state(), "state_dict_ema": state(1), **trained(), "arch": "vit"}  # noqa: E731
LIGHTNING = {"epoch": 1, "pytorch-lightning_version": "2.1", "loops": {"fit_loop": {"state_dict": {}}}}


def lightning(**more: Any) -> dict[str, Any]:
    return {**LIGHTNING, "state_dict": state(before="model."), "optimizer_states": [trained()["optimizer"]], **more}


RIGHT: dict[str, tuple[Callable[[], Any], dict[str, Any], int]] = {
    "MAE": (MAE, {}, 0),
    "DeiT": (DEIT, {"key": "model"}, 0),
    "DeiT, averaged": (DEIT, {"key": "model_ema"}, 1),
    "timm": (TIMM, {"key": "state_dict"}, 0),
    "timm, averaged": (TIMM, {"key": "state_dict_ema"}, 1),
    "Lightning": (lambda: lightning(hyper_parameters={"lr": 1.0}), {}, 0),
    "DeepSpeed": (lambda: {"module": state(), "buffer_names": [], "param_shapes": [{}], "ds_version": "0.14"}, {}, 0),
    "DDP of a compiled model": (lambda: state(before="module._orig_mod."), {}, 0),
    "FSDP": (lambda: state(before="_fsdp_wrapped_module.", inside="_fsdp_wrapped_module."), {}, 0),
    "activation checkpointing": (lambda: state(inside="_checkpoint_wrapped_module."), {}, 0),
}


@pytest.mark.parametrize("name", RIGHT)
@torch.no_grad()
def test_what_is_read(name: str, tmp_path: Path) -> None:
    made, options, seed = RIGHT[name]
    with torch.enable_grad():
        torch.save(made(), tmp_path / "checkpoint.pth")
    torch.testing.assert_close(loaded(tmp_path / "checkpoint.pth", **options), vit(seed)(IMAGE))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two states": (DEIT, r"2 state dicts \(model, model_ema\): give key= one of them"),
    "hyperparameters of a class": (
        lambda: lightning(hyper_parameters=Hyperparameters()),
        r"Hyperparameters: refused.*torch\.load\(FILE, weights_only=False\) reads it",
    ),
    "a partial": (lambda: lightning(hyper_parameters={"o": functools.partial(dict)}), r"functools\.partial: refused"),
    "a whole model": (lambda: {"model": vit(0)}, r"VisionTransformer: refused"),
    "a prefix of one's own": (
        lambda: {"state_dict": {**state(before="net."), "criterion.weight": torch.ones(5)}},
        r"stand behind 'net\.' there: save \{n\[4:\]: x for n, x in state\.items\(\) if n\.startswith\('net\.'\)\}\.$",
    ),
    "the first DINO": (
        lambda: {"teacher": {**state(before="backbone."), "head.last_layer.weight_v": torch.ones(5)}},
        r"stand behind 'backbone\.' there",
    ),
    "stage 3 of DeepSpeed": (lambda: {"module": {name: torch.empty(0) for name in state()}}, r"has shape \[0\]"),
    "a list": (lambda: [state()], "a list without a state dict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_says_how(name: str, tmp_path: Path) -> None:
    made, told = REFUSED[name]
    torch.save(made(), tmp_path / "checkpoint.pth")
    with pytest.raises(LoadError, match=told) as caught:
        loaded(tmp_path / "checkpoint.pth")
    assert "\n" not in str(caught.value)


def test_the_names_behind_a_prefix_load_as_the_sentence_says(tmp_path: Path) -> None:
    own = {"n": {**state(before="net."), "criterion.weight": torch.ones(5)}}
    torch.save(own["n"], tmp_path / "own.pth")
    with pytest.raises(LoadError) as caught:
        loaded(tmp_path / "own.pth")
    code = str(caught.value).rpartition("save ")[2].rstrip(".")
    torch.save(eval(code, {"state": own["n"]}), tmp_path / "own.pth")
    torch.testing.assert_close(loaded(tmp_path / "own.pth"), vit(0)(IMAGE))


BEGINNINGS: dict[str, tuple[str, bytes, str]] = {
    "a pointer of Git LFS": ("x.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
    "a pointer, as safetensors": ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a page": ("x.pth", b"<!DOCTYPE html><html>404</html>", "a page of the web"),
    "GGUF": ("x.gguf", b"GGUF\3\0\0\0" + b"\0" * 99, "GGUF"),
    "HDF5": ("x.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "HDF5"),
    "ONNX": ("x.onnx", b"\x08\x07\x12\x07pytorch" + b"\0" * 99, "no file of torch.save"),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_files_of_something_else(name: str, tmp_path: Path) -> None:
    file, data, told = BEGINNINGS[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(LoadError, match=told):
        loaded(tmp_path / file)


def test_files_under_the_others_name(tmp_path: Path) -> None:
    save_file({name: each.contiguous() for name, each in state().items()}, tmp_path / "x.pt")
    with pytest.raises(LoadError, match=r"call it x\.safetensors"):
        loaded(tmp_path / "x.pt")
    torch.save(state(), tmp_path / "y.safetensors")
    with pytest.raises(LoadError, match=r"call it y\.pt"):
        loaded(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["latest", "zero_to_fp32.py"], r"mp_rank_00_model_states\.pt"),
        (["model.safetensors", "optimizer.bin", "random_states_0.pkl"], r"Give .*/model\.safetensors\.$"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "in several files"),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
        (["notes.txt"], r"expected a file of weights\.$"),
    ],
)
def test_folders(files: list[str], told: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(LoadError, match=told):
        loaded(tmp_path)


def test_what_dcp_writes_loads_as_the_sentence_says(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp.save({"model": state()}, checkpoint_id=str(tmp_path / "folder"), no_dist=True)
    dcp_to_torch_save(tmp_path / "folder", tmp_path / "weights.pt")
    torch.testing.assert_close(loaded(tmp_path / "weights.pt"), vit(0)(IMAGE))


def test_a_file_of_weights_is_no_saved_folder(tmp_path: Path) -> None:
    torch.save(state(), path := tmp_path / "x.pth")
    for reference in (path, str(path), f"file:{path}"):
        with pytest.raises(UnknownName, match=rf"goes with the model it is of, as in timm:\w+@{path}\."):
            prisma.load(reference)
