"""LoRA weights, which are added to another model's, are refused wherever they lie: no base model is loaded instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loopback import Hub
from safetensors.torch import save_file

import prisma_core as prisma
from prisma_core import LoadError
from prisma_core.files.checkpoint import read_checkpoint, read_outline

AT = "base_model.model.vit.layers.0.attention.q_proj"
LORA = {f"{AT}.lora_A.weight": torch.ones(4, 24), f"{AT}.lora_B.weight": torch.ones(24, 4)}
MERGE = r"LoRA weights.*merge_and_unload.*save_pretrained"


def adapter(folder: Path) -> Path:
    """Write what peft's ``save_pretrained`` writes."""
    folder.mkdir(exist_ok=True)
    save_file(LORA, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    return folder


def test_beside_the_weights_of_a_model_of_transformers(tmp_path: Path) -> None:
    tr = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    tr.ViTForImageClassification(tr.ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path)
    reference = f"hf:{tmp_path}"
    prisma.load(reference)
    adapter(tmp_path)
    with pytest.raises(LoadError, match=MERGE):
        prisma.load(reference)
    prisma.load(reference, pretrained=False)  # no weights are asked for


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_repository_of_the_hub_that_holds_nothing_else(pretrained: bool, loopback: Hub) -> None:
    pytest.importorskip("transformers")
    adapter(loopback.repository("someone/lora"))
    with pytest.raises(LoadError, match=MERGE):
        prisma.load("hf:someone/lora", pretrained=pretrained)


@pytest.mark.parametrize("source", ["hf", "open_clip", "file", "timm"])
def test_folders_of_any_source(source: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=MERGE):
        prisma.load(f"{source}:{adapter(tmp_path / 'lora')}")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_a_part_of_what_peft_writes(name: str, tmp_path: Path) -> None:
    whole = adapter(tmp_path / "lora")
    (tmp_path / "part").mkdir()
    source = whole / (name if (whole / name).exists() else "adapter_model.safetensors")
    (tmp_path / "part" / name).write_bytes(source.read_bytes())
    with pytest.raises(LoadError, match=rf"{name}.*merge_and_unload"):
        prisma.load(f"hf:{tmp_path / 'part'}")


@pytest.mark.parametrize("name", [*LORA, f"{AT}.base_layer.weight", "blocks.0.attn.qkv.lora_magnitude_vector"])
def test_files_of_any_kind(name: str, tmp_path: Path) -> None:
    state = {name: torch.ones(4, 4), "blocks.0.norm1.weight": torch.ones(4)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pt")
    for file in ("w.safetensors", "w.pt"):
        for read in (read_checkpoint, read_outline):
            with pytest.raises(LoadError, match=MERGE):
                read(tmp_path / file)
    plain = {"blocks.0.attn.explora_gate.weight": torch.ones(4)}
    save_file(plain, tmp_path / "w.safetensors")
    assert read_checkpoint(tmp_path / "w.safetensors").keys() == plain.keys()


@pytest.mark.parametrize("reference", ["dino:{}", "timm:vit_tiny_patch16_224@{}"])
def test_by_sources_of_files(reference: str, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    with pytest.raises(LoadError, match=MERGE):
        prisma.load(reference.format(adapter(tmp_path) / "adapter_model.safetensors"))
