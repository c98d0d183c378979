"""A tensor that a reader does not know may act, as a scale or a second bias does: no format leaves one out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import D_SAE, class_of, saev, standard
from prisma_sae import CoderFacts, SparseCoder, read, save
from safetensors.torch import save_file
from torch import Tensor

from prisma_core import LoadError

Tensors = dict[str, Tensor]
T = standard()


def as_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def prisma(folder: Path, more: Tensors) -> Path:
    facts = CoderFacts(kind="standard", d_in=6, d_sae=D_SAE, d_out=6)
    save(SparseCoder(facts, T), folder)
    if more:  # by another hand: the digest of the weights tells
        save_file(T | more, folder / "sae_weights.safetensors")
    return folder


def sae_lens(folder: Path, more: Tensors) -> Path:
    as_json(folder / "cfg.json", {"architecture": "standard", "d_in": 6, "d_sae": D_SAE})
    save_file(T | more, folder / "sae_weights.safetensors")
    return folder


def sparsify(folder: Path, more: Tensors) -> Path:
    names = {"encoder.weight": T["W_enc"].T.contiguous(), "encoder.bias": T["b_enc"]}
    save_file(names | {"W_dec": T["W_dec"], "b_dec": T["b_dec"]} | more, folder / "sae.safetensors")
    as_json(folder / "cfg.json", {"k": 4, "d_in": 6})
    return folder


def dictionary(name: str, **others: Tensor) -> Callable[[Path, Tensors], Path]:
    def write(folder: Path, more: Tensors) -> Path:
        linear = {"encoder.weight": T["W_enc"].T, "encoder.bias": T["b_enc"], "decoder.weight": T["W_dec"].T}
        torch.save(linear | others | more, folder / "ae.pt")
        as_json(folder / "config.json", {"trainer": {"dict_class": name, "k": 4}})
        return folder

    return write


def per_layer(folder: Path, more: Tensors) -> Path:
    save_file(T | {"W_enc": T["W_enc"].T.contiguous()} | more, folder / "layer_0.safetensors")
    return folder / "layer_0.safetensors"


def crossing(of: str) -> Callable[[Path, Tensors], Path]:
    def write(folder: Path, more: Tensors) -> Path:
        encoder = {"W_enc_0": T["W_enc"].T.contiguous(), "b_enc_0": T["b_enc"], "b_dec_0": T["b_dec"]}
        save_file(encoder | (more if of == "encoder" else {}), folder / "W_enc_0.safetensors")
        decoder = {"W_dec_0": T["W_dec"][:, None].contiguous()}
        save_file(decoder | (more if of == "decoder" else {}), folder / "W_dec_0.safetensors")
        return folder / "W_enc_0.safetensors"

    return write


def of_saev(folder: Path, more: Tensors) -> Path:
    with (folder / "sae.pt").open("wb") as file:
        saev(file, T | more, {"schema": 5, "cfg": {"activation": {"cls": "Relu", "params": {}}}})
    return folder / "sae.pt"


def vit_prisma(folder: Path, more: Tensors) -> Path:
    torch.save(T | more, folder / "weights.pt")
    as_json(folder / "config.json", {"activation_fn_str": "relu", "hook_point": "blocks.0.hook_mlp_out"})
    return folder


def patch_sae(folder: Path, more: Tensors) -> Path:
    with class_of("src.sae_training.config.ViTSAERunnerConfig", block_layer=0) as config:
        torch.save({"cfg": config, "state_dict": T | more}, folder / "sae.pt")
    return folder / "sae.pt"


def msae(folder: Path, more: Tensors) -> Path:
    model = {"pre_bias": T["b_dec"], "encoder": T["W_enc"], "decoder": T["W_dec"], "latent_bias": T["b_enc"]}
    torch.save({"model": model | more}, folder / "16_6_ReLU.pth")
    return folder / "16_6_ReLU.pth"


def universal(folder: Path, more: Tensors) -> Path:
    state = {"encoder.final_block.0.weight": T["W_enc"].T, "encoder.final_block.0.bias": T["b_enc"]}
    weights = torch.nn.functional.normalize(T["W_dec"], dim=-1)
    torch.save({"model_state_dict": state | {"dictionary._weights": weights} | more}, folder / "sae.pth")
    return folder / "sae.pth"


WRITERS: dict[str, tuple[Callable[[Path, Tensors], Path], dict[str, Any]]] = {
    "Prisma": (prisma, {}),
    "SAELens": (sae_lens, {}),
    "sparsify": (sparsify, {}),
    "dictionary_learning, AutoEncoder": (dictionary("AutoEncoder", bias=T["b_dec"]), {}),
    "dictionary_learning, TopK": (dictionary("AutoEncoderTopK", b_dec=T["b_dec"], k=torch.tensor(4)), {}),
    "circuit-tracer": (per_layer, {}),
    "circuit-tracer, cross-layer encoder": (crossing("encoder"), {}),
    "circuit-tracer, cross-layer decoder": (crossing("decoder"), {}),
    "saev": (of_saev, {}),
    "ViT-Prisma": (vit_prisma, {}),
    "PatchSAE": (patch_sae, {}),
    "MSAE": (msae, {}),
    "UniversalSAE": (universal, {"k": 4}),
}


@pytest.mark.parametrize("name", ["scale", "b_out", "activation.scale", "encoder.scale"])
@pytest.mark.parametrize("form", WRITERS)
def test_a_tensor_of_unknown_use_is_refused_in_every_format(form: str, name: str, tmp_path: Path) -> None:
    write, options = WRITERS[form]
    for folder in ("without", "with"):
        (tmp_path / folder).mkdir()
    assert read(write(tmp_path / "without", {}), **options).W_enc.shape == (6, D_SAE)
    path = write(tmp_path / "with", {name: torch.full((1,), 2.0)})
    with pytest.raises(LoadError, match=r"other weights than" if form == "Prisma" else name):
        read(path, **options)


def test_a_threshold_of_a_class_that_has_none_is_refused(tmp_path: Path) -> None:
    path = dictionary("AutoEncoder", bias=T["b_dec"])(tmp_path, {"threshold": torch.tensor(0.5)})
    with pytest.raises(LoadError, match="holds threshold, whose use"):
        read(path)


def test_a_pickled_model_with_a_parameter_of_its_own_is_refused(tmp_path: Path) -> None:
    library = pytest.importorskip("overcomplete.sae", reason="overcomplete is not installed")
    model = library.TopKSAE(6, D_SAE, top_k=3).eval()
    torch.save(model, tmp_path / "sae.pth")
    assert read(tmp_path / "sae.pth").facts.k == 3
    model.dictionary.scale = torch.nn.Parameter(torch.ones(1))
    torch.save(model, tmp_path / "sae.pth")
    with pytest.raises(LoadError, match=r"holds dictionary\.scale, whose use"):
        read(tmp_path / "sae.pth")
