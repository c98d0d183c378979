"""Files of SAELens, dictionary_learning, saev, sparsify, circuit-tracer, MSAE and PatchSAE, and the traps in them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import D_IN, D_SAE, class_of, drawn, rows, standard, top
from hostile import RunsCommand
from prisma_sae import SparseCoder, read, save
from safetensors.torch import load_file, save_file
from torch import Tensor

from prisma_core import InputError, LoadError, UnknownName

X = rows()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def far(ours: Tensor, theirs: Tensor) -> None:
    """Show that a wrong reading would be seen."""
    assert (ours - theirs).abs().max() > 1e-2


def encoded(t: dict[str, Tensor], x: Tensor = X, *, minus: str | None = "b_dec") -> Tensor:
    return (x if minus is None else x - t[minus]) @ t["W_enc"] + t["b_enc"]


# -------------------------------------------------------------------- SAELens

METADATA = {"model_name": "timm:vit_base_patch16_224", "hook_name": "blocks.5.hook_resid_post"}
V6: dict[str, Any] = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "architecture": "standard",
    "metadata": METADATA | {"sae_lens_version": "6.18.0"},
}


def sae_lens(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> SparseCoder:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return read(folder)


@pytest.mark.parametrize("subtract", [True, False])
def test_sae_lens_standard_with_and_without_the_bias_on_the_input(tmp_path: Path, subtract: bool) -> None:
    t = standard()
    coder = sae_lens(tmp_path, t, V6 | {"apply_b_dec_to_input": subtract})
    f = encoded(t, minus="b_dec" if subtract else None).relu()
    close(coder.encode(X), f)
    close(coder(X), f @ t["W_dec"] + t["b_dec"])
    far(coder.encode(X), encoded(t, minus=None if subtract else "b_dec").relu())
    assert (coder.facts.model, coder.facts.hook) == (METADATA["model_name"], METADATA["hook_name"])


def test_sae_lens_topk_and_its_rescaling_by_decoder_norms(tmp_path: Path) -> None:
    t = standard()
    plain = sae_lens(tmp_path / "a", t, V6 | {"architecture": "topk", "k": 3})
    close(plain.encode(X), top(encoded(t), 3).relu())
    coder = sae_lens(tmp_path / "b", t, V6 | {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True})
    norm = t["W_dec"].norm(dim=-1)
    f = top(encoded(t) * norm, 3).relu()
    close(coder.encode(X), f)
    close(coder(X), (f * (1 / norm)) @ t["W_dec"] + t["b_dec"])
    assert ((coder.encode(X) > 0) != (plain.encode(X) > 0)).any()


def test_sae_lens_jumprelu_compares_before_the_relu(tmp_path: Path) -> None:
    t = standard() | {"threshold": drawn(5, t=(D_SAE,))["t"].abs()}
    coder = sae_lens(tmp_path, t, V6 | {"architecture": "jumprelu"})
    h = encoded(t)
    close(coder.encode(X), h.relu() * (h > t["threshold"]))
    far(coder.encode(X), (h - t["threshold"]).relu())


def test_sae_lens_gated_has_no_b_enc(tmp_path: Path) -> None:
    t = standard() | drawn(1, b_gate=(D_SAE,), r_mag=(D_SAE,), b_mag=(D_SAE,))
    del t["b_enc"]
    coder = sae_lens(tmp_path, t, V6 | {"architecture": "gated"})
    u = X - t["b_dec"]
    magnitude = (u @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    close(coder.encode(X), ((u @ t["W_enc"] + t["b_gate"]) > 0) * magnitude)


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_sae_lens_transcoders_take_nothing_off_their_input_and_leave_the_output_normalised(
    tmp_path: Path, architecture: str
) -> None:
    d_out = D_IN + 2
    t = drawn(0, W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, d_out), b_dec=(d_out,))
    if architecture == "skip_transcoder":
        t |= drawn(1, W_skip=(d_out, D_IN))
    if architecture == "jumprelu_transcoder":
        t |= {"threshold": torch.full((D_SAE,), 0.7)}
    metadata = METADATA | {"hook_name_out": "blocks.5.hook_mlp_out"}
    how = "none" if "skip" in architecture else "layer_norm"
    config = V6 | {"architecture": architecture, "d_out": d_out, "metadata": metadata, "normalize_activations": how}
    coder = sae_lens(tmp_path, t, config)
    u = X if "skip" in architecture else (X - X.mean(-1, keepdim=True)) / (X.std(-1, keepdim=True) + 1e-5)
    h = encoded(t, u, minus=None)
    y = (h.relu() * (h > 0.7) if "threshold" in t else h.relu()) @ t["W_dec"] + t["b_dec"]
    close(coder(X), y + X @ t["W_skip"].T if "W_skip" in t else y)
    assert coder.facts.hook_out == "blocks.5.hook_mlp_out"
    assert coder.is_transcoder


def test_sae_lens_before_version_6_is_flat_and_names_topk_by_its_activation(tmp_path: Path) -> None:
    t = standard()
    old = {
        "hook_point": "blocks.7.hook_resid_pre",
        "hook_point_layer": 7,
        "model_name": "gpt2-small",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "normalize_activations": False,
        "d_in": D_IN,
        "d_sae": D_SAE,
    }
    coder = sae_lens(tmp_path, t, old)
    close(coder.encode(X), top(encoded(t), 5).relu())  # the bias was always taken off
    assert (coder.facts.hook, coder.facts.model, coder.facts.k) == ("blocks.7.hook_resid_pre", "gpt2-small", 5)


def test_sae_lens_scaling_of_a_checkpoint_counts_and_of_a_finished_coder_is_in_its_weights(tmp_path: Path) -> None:
    t, config = standard(), V6 | {"normalize_activations": "expected_average_only_in"}
    finished = sae_lens(tmp_path, t, config)
    close(finished.encode(X), encoded(t).relu())
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    checkpoint = read(tmp_path)
    folded = t | {"W_enc": t["W_enc"] * 0.25, "W_dec": t["W_dec"] / 0.25, "b_dec": t["b_dec"] / 0.25}
    close(checkpoint.encode(X), encoded(folded).relu())
    close(checkpoint(X), encoded(folded).relu() @ folded["W_dec"] + folded["b_dec"])


def test_sae_lens_with_what_has_no_meaning_here_is_refused(tmp_path: Path) -> None:
    for index, change in enumerate(({"architecture": "temporal"}, {"normalize_activations": "covariance_whitening"})):
        with pytest.raises(LoadError, match=next(iter(change.values()))):
            sae_lens(tmp_path / str(index), standard(), V6 | change)
    lacking = standard()
    del lacking["W_dec"]
    with pytest.raises((LoadError, KeyError)):
        sae_lens(tmp_path / "lacking", lacking, V6)


# -------------------------------------------------------------------- our own


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_what_is_saved_is_read_back_and_by_sae_lens_rules_too(tmp_path: Path, architecture: str) -> None:
    t = standard()
    if architecture == "gated":
        t |= drawn(1, b_gate=(D_SAE,), r_mag=(D_SAE,), b_mag=(D_SAE,))
        del t["b_enc"]
    if architecture == "jumprelu":
        t |= {"threshold": drawn(5, t=(D_SAE,))["t"].abs()}
    coder = sae_lens(tmp_path / "a", t, V6 | {"architecture": architecture, "k": 3})
    folder = save(coder, tmp_path / "b")
    assert set(load_file(folder / "sae_weights.safetensors")) == set(t)  # SAELens refuses any other
    again = read(folder)
    assert again.facts == coder.facts
    assert torch.equal(again(X), coder(X))
    (folder / "prisma.json").unlink()
    theirs = read(folder)
    assert torch.equal(theirs(X), coder(X))
    assert theirs.facts.hook == coder.facts.hook


def test_a_coder_that_sae_lens_computes_otherwise_is_saved_without_its_config(tmp_path: Path) -> None:
    with (tmp_path / "sae.pt").open("wb") as file:
        saev(file, standard(), {"schema": 5, "cfg": {"activation": {"cls": "TopK", "params": {"top_k": 3}}}})
    coder = read(tmp_path / "sae.pt")
    folder = save(coder, tmp_path / "out")
    assert not (folder / "cfg.json").exists()
    assert torch.equal(read(folder)(X), coder(X))


# -------------------------------------------------------------------- dictionary_learning


def dictionary(folder: Path, tensors: dict[str, Tensor], name: str, **options: Any) -> SparseCoder:
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "lm_name": "m", "k": 3}}))
    return read(folder, **options)


def linear(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as ``nn.Linear`` holds them."""
    return {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T.contiguous(),
    }


def test_dictionary_learning_old_and_new_autoencoders_differ_in_their_input(tmp_path: Path) -> None:
    t = standard()
    old = dictionary(tmp_path / "a", linear(t) | {"bias": t["b_dec"]}, "AutoEncoder")
    close(old(X), encoded(t).relu() @ t["W_dec"] + t["b_dec"])
    new = dictionary(tmp_path / "b", linear(t) | {"decoder.bias": t["b_dec"]}, "AutoEncoderNew")
    close(new.encode(X), encoded(t, minus=None).relu())
    far(new.encode(X), old.encode(X))
    # Its from_pretrained would scale features to decoder columns of norm 1.
    assert (t["W_dec"].norm(dim=-1) - 1).abs().max() > 0.1
    assert torch.equal(old.W_dec, t["W_dec"])


def test_dictionary_learning_gated_adds_its_gate_after_one_product(tmp_path: Path) -> None:
    t = standard() | drawn(1, b_gate=(D_SAE,), r_mag=(D_SAE,), b_mag=(D_SAE,))
    held = {key: value for key, value in linear(t).items() if key != "encoder.bias"}
    held |= {"decoder_bias": t["b_dec"], "r_mag": t["r_mag"], "gate_bias": t["b_gate"], "mag_bias": t["b_mag"]}
    coder = dictionary(tmp_path, held, "GatedAutoEncoder")
    h = (X - t["b_dec"]) @ t["W_enc"]
    close(coder.encode(X), (h + t["b_gate"] > 0) * (t["r_mag"].exp() * h + t["b_mag"]).relu())


def test_dictionary_learning_topk_and_batch_topk(tmp_path: Path) -> None:
    t = standard()
    held = linear(t) | {"b_dec": t["b_dec"], "k": torch.tensor(3, dtype=torch.int32)}
    h = encoded(t).relu()
    by_k = dictionary(tmp_path / "a", held | {"threshold": torch.tensor(0.8)}, "AutoEncoderTopK")
    close(by_k.encode(X), top(h, 3))
    by_threshold = dictionary(
        tmp_path / "b", held | {"threshold": torch.tensor(0.8)}, "AutoEncoderTopK", use_threshold=True
    )
    close(by_threshold.encode(X), h * (h > 0.8))
    batch = dictionary(tmp_path / "c", held | {"threshold": torch.tensor(0.8)}, "BatchTopKSAE")
    close(batch.encode(X), h * (h > 0.8))
    assert batch.facts.kind == "batchtopk"
    with pytest.raises(LoadError, match=r"-1\.0"):
        dictionary(tmp_path / "d", held | {"threshold": torch.tensor(-1.0)}, "BatchTopKSAE")


def test_dictionary_learning_jumprelu_and_matryoshka(tmp_path: Path) -> None:
    t = standard() | {"threshold": torch.full((D_SAE,), 0.6)}
    jump = dictionary(tmp_path / "a", t, "JumpReluAutoEncoder")
    h = encoded(t, minus=None)
    close(jump.encode(X), (h * (h > 0.6)).relu())
    held = t | {"threshold": torch.tensor(0.6), "k": torch.tensor(3), "group_sizes": torch.tensor([4, 4, 8])}
    nested = dictionary(tmp_path / "b", held, "MatryoshkaBatchTopKSAE")
    h = encoded(t).relu()
    close(nested.encode(X), h * (h > 0.6))
    assert nested.facts.groups == (4, 8, 16)
    first = nested.first(4)
    close(first(X), (h * (h > 0.6))[:, :4] @ t["W_dec"][:4] + t["b_dec"])
    assert first.facts.groups == (4,)
    with pytest.raises(LoadError, match="MatryoshkaBatchTopKSAE"):
        dictionary(tmp_path / "c", held, "IdentityDict")


# -------------------------------------------------------------------- saev


def saev(file: Any, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    file.write((json.dumps(header) + "\n").encode())
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    file.write(buffer.getvalue())


def saev_coder(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], **options: Any) -> SparseCoder:
    with path.open("wb") as file:
        saev(file, tensors, header)
    return read(path, **options)


def signed(h: Tensor, k: int) -> Tensor:
    kept = h.topk(k, dim=-1)
    return torch.zeros_like(h).scatter(-1, kept.indices, kept.values)


def test_saev_without_a_schema_takes_the_bias_off_and_with_one_does_not(tmp_path: Path) -> None:
    t = standard()
    legacy = {"d_vit": D_IN, "exp_factor": 2, "sparsity_coeff": 0.0004, "ghost_grads": False, "seed": 1}
    old = saev_coder(tmp_path / "old.pt", t, legacy)
    close(old.encode(X), encoded(t).relu())
    schema = {"schema": 5, "cfg": {"activation": {"cls": "Relu", "params": {}}}, "commit": "", "lib": ""}
    new = saev_coder(tmp_path / "new.pt", t, schema)
    close(new.encode(X), encoded(t, minus=None).relu())
    close(new(X), encoded(t, minus=None).relu() @ t["W_dec"] + t["b_dec"])
    far(new.encode(X), old.encode(X))


@pytest.mark.parametrize(
    "header",
    [
        {"schema": 1, "cls": "TopK", "cfg": {"d_vit": D_IN, "top_k": 14}},
        {
            "schema": 1,
            "cls": "SparseAutoencoderConfig",
            "cfg": {"d_vit": D_IN, "activation": {"cls": "TopK", "params": {"top_k": 14}}},
        },
        {"schema": 2, "cfg": {"activation": {"cls": "TopK", "params": {"top_k": 14}}}},
        {"schema": 5, "cfg": {"activation": {"cls": "TopK", "params": {"top_k": 14}}}},
        {"schema": 2, "cfg": {"activation": {"cls": "BatchTopK", "params": {"top_k": 14}}}},
    ],
    ids=["1a", "1b", "2", "5", "2 batch"],
)
def test_saev_topk_of_every_schema_keeps_negative_values(tmp_path: Path, header: dict[str, Any]) -> None:
    t = standard()
    coder = saev_coder(tmp_path / "sae.pt", t, header)
    h = encoded(t, minus=None)
    close(coder.encode(X), signed(h, 14))
    far(coder.encode(X), signed(h, 14).relu())


def test_saev_batch_topk_has_a_threshold_from_schema_5_on(tmp_path: Path) -> None:
    t = standard()
    header = {"schema": 5, "cfg": {"activation": {"cls": "BatchTopK", "params": {"top_k": 3}}}}
    coder = saev_coder(tmp_path / "sae.pt", t | {"activation.threshold": torch.tensor(-0.5)}, header)
    h = encoded(t, minus=None)
    close(coder.encode(X), h * (h > -0.5))


def test_saev_activations_of_dinov2_were_standardised(tmp_path: Path) -> None:
    t, mean = standard(), drawn(7, m=(D_IN,))["m"]
    schema = {"schema": 5, "cfg": {"activation": {"cls": "Relu", "params": {}}}}
    coder = saev_coder(tmp_path / "sae.pt", t, schema, mean=mean, scale=2.0181241035461426)
    u = (X - mean) / 2.0181241035461426
    f = encoded(t, u, minus=None).relu()
    close(coder.encode(X), f)
    close(coder(X), (f @ t["W_dec"] + t["b_dec"]) * 2.0181241035461426 + mean)
    with pytest.raises(LoadError, match="schema 9"):
        saev_coder(tmp_path / "sae.pt", t, schema | {"schema": 9})


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


# -------------------------------------------------------------------- reading at large


def test_what_is_no_coder_is_refused_with_the_formats_there_are(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(LoadError, match=r"notes\.txt.*sae_lens"):
        read(tmp_path)
    with pytest.raises(LoadError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(UnknownName, match="saev"):
        read(tmp_path, format="saevv")
    with (tmp_path / "sae.pt").open("wb") as file:
        saev(file, standard(), {"d_vit": D_IN})
    with pytest.raises(InputError, match="scale"):
        read(tmp_path / "sae.pt", scales=2)
    mark = tmp_path / "ran"
    with (tmp_path / "sae.pt").open("wb") as file:
        saev(file, {"W_enc": RunsCommand(mark)}, {"d_vit": D_IN})  # type: ignore[dict-item]
    with pytest.raises(LoadError):
        read(tmp_path / "sae.pt")
    assert not mark.exists()


def test_a_coder_of_the_wrong_shapes_or_without_k_is_refused(tmp_path: Path) -> None:
    t = standard()
    with pytest.raises(LoadError, match="b_enc"):
        sae_lens(tmp_path / "a", t | {"b_enc": torch.zeros(3)}, V6)
    with pytest.raises(LoadError, match="k from 1 to 16"):
        sae_lens(tmp_path / "b", t, V6 | {"architecture": "topk"})
    coder = sae_lens(tmp_path / "c", t, V6)
    with pytest.raises(InputError, match=r"\[\.\.\. 6\].*\[4, 7\]"):
        coder(torch.zeros(4, 7))
    with pytest.raises(InputError, match="1 to 16"):
        coder.first(17)
