"""Files of sparsify, circuit-tracer, MSAE and PatchSAE, and the traps in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from coders import D_IN, D_SAE, X, class_of, close, drawn, encoded, far, standard, top
from prisma_sae import read
from safetensors.torch import save_file

from prisma_core import LoadError

# -------------------------------------------------------------------- sparsify, circuit-tracer


@pytest.mark.parametrize("transcode", [True, False])
def test_sparsify_subtracts_the_bias_unless_it_transcodes(tmp_path: Path, transcode: bool) -> None:
    t = standard() | drawn(1, W_skip=(D_IN, D_IN))
    held = {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "encoder.bias": t["b_enc"],
        "W_dec": t["W_dec"],
        "b_dec": t["b_dec"],
    }
    save_file(held | ({"W_skip": t["W_skip"]} if transcode else {}), tmp_path / "sae.safetensors")
    config = {"activation": "topk", "k": 4, "d_in": D_IN, "transcode": transcode, "skip_connection": transcode}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    coder = read(tmp_path)
    f = top(encoded(t, minus=None if transcode else "b_dec").relu(), 4)
    close(coder.encode(X), f)
    y = f @ t["W_dec"] + t["b_dec"]
    close(coder(X), y + X @ t["W_skip"].T if transcode else y)


def test_sparsify_groupmax_keeps_one_of_each_group(tmp_path: Path) -> None:
    t = standard()
    held = {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "encoder.bias": t["b_enc"],
        "W_dec": t["W_dec"],
        "b_dec": t["b_dec"],
    }
    save_file(held, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"activation": "groupmax", "k": 4, "d_in": D_IN}))
    f = read(tmp_path).encode(X)
    h = encoded(t).relu()
    for group in range(4):
        part = slice(4 * group, 4 * group + 4)  # neighbours
        close(f[:, part].sum(-1), h[:, part].max(-1).values)
        assert ((f[:, part] != 0).sum(-1) <= 1).all()


def test_circuit_tracer_transposes_its_encoder(tmp_path: Path) -> None:
    t = drawn(0, W_enc=(D_IN, D_IN), b_enc=(D_IN,), W_dec=(D_IN, D_IN), b_dec=(D_IN,), W_skip=(D_IN, D_IN))
    t["threshold"] = torch.full((D_IN,), 0.4)
    names = {"threshold": "activation_function.threshold"}
    for layer in (0, 3):
        held = {names.get(key, key): value + layer for key, value in t.items()}
        held["W_enc"] = held["W_enc"].T.contiguous()
        save_file(held, tmp_path / f"layer_{layer}.safetensors")
    (tmp_path / "config.yaml").write_text(
        'model_name: "google/gemma-2-2b"\nfeature_input_hook: "mlp.hook_in"\nfeature_output_hook: "hook_mlp_out"\n'
    )
    coder = read(tmp_path, layer=0)
    h = encoded(t, minus=None)
    close(coder(X), (h.relu() * (h > 0.4)) @ t["W_dec"] + t["b_dec"] + X @ t["W_skip"].T)
    assert (coder.facts.hook, coder.facts.hook_out) == ("blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out")
    assert read(tmp_path / "layer_3.safetensors").facts.hook_out == "blocks.3.hook_mlp_out"
    with pytest.raises(LoadError, match=r"\[0, 3\]"):
        read(tmp_path)


def test_circuit_tracers_activations_take_no_relu(tmp_path: Path) -> None:
    t = standard()
    held = {**t, "W_enc": t["W_enc"].T.contiguous()}
    h = encoded(t, minus=None)
    below = torch.linspace(-4, 2, D_SAE)
    jump, topk = h * (h > below), torch.zeros_like(h)
    for row, places in enumerate(h.topk(14).indices.tolist()):
        topk[row, places] = h[row, places]
    assert (jump < 0).any()
    assert (topk < 0).any()
    save_file(held | {"activation_function.threshold": below}, tmp_path / "layer_0.safetensors")
    close(read(tmp_path, layer=0).encode(X), jump)
    save_file(held | {"k": torch.tensor(14)}, tmp_path / "layer_0.safetensors")  # as its own saver writes it
    close(read(tmp_path, layer=0).encode(X), topk)
    save_file(held, tmp_path / "layer_0.safetensors")
    (tmp_path / "config.yaml").write_text("activation: topk\nk: 14\n")
    close(read(tmp_path, layer=0).encode(X), topk)
    save_file(held | {"activation_function.threshold": below}, tmp_path / "layer_0.safetensors")
    close(read(tmp_path, layer=0).encode(X), topk)
    (tmp_path / "config.yaml").write_text("activation: relu\n")
    close(read(tmp_path, layer=0).encode(X), h.relu())


def test_circuit_tracers_cross_layer_transcoders_write_to_each_later_layer(tmp_path: Path) -> None:
    t = drawn(0, W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), b_dec=(D_IN,))
    decoders = drawn(1, W_dec=(D_SAE, 2, D_IN))["W_dec"]
    biases = drawn(2, b=(3, D_IN))["b"]
    for layer in (1, 2):
        held = {
            f"W_enc_{layer}": t["W_enc"].T.contiguous(),
            f"b_enc_{layer}": t["b_enc"],
            f"b_dec_{layer}": biases[layer],
        }
        save_file(held, tmp_path / f"W_enc_{layer}.safetensors")
    save_file({"W_dec_1": decoders}, tmp_path / "W_dec_1.safetensors")
    f = encoded(t, minus=None).relu()
    close(read(tmp_path, layer=1)(X), f @ decoders[:, 0] + biases[1])
    close(read(tmp_path, layer=1, to=2)(X), f @ decoders[:, 1] + biases[2])
    with pytest.raises(LoadError, match="1 to 2"):
        read(tmp_path, layer=1, to=3)


# -------------------------------------------------------------------- MSAE, PatchSAE


def test_msae_is_named_scaled_and_capped(tmp_path: Path) -> None:
    t, mean = standard(), drawn(3, m=(D_IN,))["m"]
    model = {"pre_bias": t["b_dec"], "encoder": t["W_enc"], "decoder": t["W_dec"], "latent_bias": t["b_enc"]}
    model["latents_activation_frequency"] = torch.zeros(D_SAE, dtype=torch.int64)
    path = tmp_path / f"{D_SAE}_{D_IN}_TopKReLU_4_UW_False_cc3m.pth"
    torch.save({"model": model, "mean_center": mean, "scaling_factor": 3.5, "target_norm": 1.0}, path)
    coder = read(path)
    f = 30 * torch.tanh(top(encoded(t, (X - mean) * 3.5), 4).relu() / 30)
    close(coder.encode(X), f)
    close(coder(X), (f @ t["W_dec"] + t["b_dec"]) / 3.5 + mean)
    far(read(path, soft_cap=None).encode(X), f)
    path.rename(tmp_path / "renamed.pth")
    with pytest.raises(LoadError, match="activation="):
        read(tmp_path / "renamed.pth")
    assert torch.equal(read(tmp_path / "renamed.pth", activation="TopKReLU", k=4).encode(X), coder.encode(X))


def test_patch_sae_is_read_as_a_stub(tmp_path: Path) -> None:
    t, path = standard(), tmp_path / "clip-vit-base-patch16_-2_resid_16.pt"
    name = "src.sae_training.config.ViTSAERunnerConfig"
    fields = {"model_name": "openai/clip-vit-base-patch16", "block_layer": -2, "class_token": True, "gated_sae": False}
    with class_of(name, **fields, device=torch.device("cpu"), dtype=torch.float32) as config:
        torch.save({"cfg": config, "state_dict": t}, path)
    coder = read(path, n_layers=12)
    close(coder(X), encoded(t).relu() @ t["W_dec"] + t["b_dec"])
    assert (coder.facts.hook, coder.facts.tokens) == ("blocks.10.hook_resid_post", "cls")
    assert coder.facts.model == "hf:openai/clip-vit-base-patch16"
    with pytest.raises(LoadError, match="n_layers"):
        read(path)
