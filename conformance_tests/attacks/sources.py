"""A small model of each source that reads files, as its file, and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import prisma_core as prisma

VIT: dict[str, Any] = {"depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5, "img_size": 16, "patch_size": 8}
CLIP: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"width": 32, "layers": 2, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"width": 16, "heads": 2, "layers": 2, "context_length": 8, "vocab_size": 64},
}
HF: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}


class Written(NamedTuple):
    """A model as files.

    Attributes:
        state: its tensors.
        save: writes others in their place.
        load: returns the model that the files make now.
    """

    state: dict[str, Tensor]
    save: Callable[[dict[str, Any]], object]
    load: Callable[..., Any]


def of_torch(path: Path, state: dict[str, Tensor], load: Callable[..., Any]) -> Written:
    torch.save(state, path)
    return Written(state, lambda others: torch.save(others, path), load)


def timm(folder: Path) -> Written:
    import timm as library

    path = folder / "weights.pth"
    state = library.create_model("vit_tiny_patch16_224", **VIT).state_dict()
    return of_torch(path, state, lambda **o: prisma.load(f"timm:vit_tiny_patch16_224@{path}", **VIT, **o))


def dino(folder: Path) -> Written:
    from prisma_dino.meta import Architecture
    from prisma_dino.meta_cases import SMALL, build

    path = folder / "weights.pth"
    state = build(Architecture(**SMALL)).state_dict()
    return of_torch(path, state, lambda **o: prisma.load(f"dino:{path}", heads=3, **o))


def toy(folder: Path) -> Written:
    from prisma_toy.cases import shapes

    path = folder / "weights.pth"
    state = {name: torch.randn(shape) for name, shape in shapes().items()}
    return of_torch(path, state, lambda **o: prisma.load(f"toy:{path}", **o))


def open_clip(folder: Path) -> Written:
    path, config = folder / "weights.pt", folder / "clip.json"
    config.write_text(json.dumps({"model_cfg": CLIP}))
    from prisma_clip.source import OpenClipSource

    state = OpenClipSource().load(str(config), pretrained=False).model.state_dict()
    return of_torch(path, state, lambda **o: prisma.load(f"open_clip:{config}@{path}", **o))


def of_safetensors(folder: Path, load: Callable[..., Any]) -> Written:
    path = folder / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    return Written(state, lambda others: save_file(others, path, {"format": "pt"}), load)


def hf(folder: Path) -> Written:
    import transformers

    config = transformers.ViTConfig(**HF, image_size=16, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return of_safetensors(folder, lambda **o: prisma.load(f"hf:{folder}", **o))


def hf_pickle(folder: Path) -> Written:
    written = hf(folder)
    (folder / "model.safetensors").unlink()
    return of_torch(folder / "pytorch_model.bin", written.state, written.load)


def file(folder: Path) -> Written:
    prisma.save(prisma.load("timm:vit_tiny_patch16_224", pretrained=False, **VIT), folder)
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**spec, "weights": None}))  # as folders were before digests
    return of_safetensors(folder, lambda **o: prisma.load(f"file:{folder}", **o))


SOURCES: dict[str, Callable[[Path], Written]] = {
    "timm": timm,
    "dino": dino,
    "toy": toy,
    "open_clip": open_clip,
    "hf": hf,
    "hf pickle": hf_pickle,
    "file": file,
}
