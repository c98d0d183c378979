"""Files of SAELens and our own, the traps in them, and files that are no coder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import D_IN, D_SAE, X, close, drawn, encoded, far, saev, standard, top
from hostile import RunsCommand
from prisma_sae import CoderFacts, SparseCoder, read, save
from safetensors.torch import load_file, save_file
from torch import Tensor

from prisma_core import InputError, LoadError, UnknownName

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


def test_sae_lens_abstopk_ranks_by_magnitude_and_keeps_signs(tmp_path: Path) -> None:
    t, how = standard(), V6 | {"architecture": "abstopk", "k": 3}
    coder, h = sae_lens(tmp_path / "a", t, how), encoded(t)
    f = h * (h.abs() >= h.abs().topk(3).values[:, -1:])
    close(coder.encode(X), f)
    close(coder(X), f @ t["W_dec"] + t["b_dec"])
    far(coder.encode(X), top(h, 3).relu())
    scaled = sae_lens(tmp_path / "b", t, how | {"rescale_acts_by_decoder_norm": True})
    h = h * t["W_dec"].norm(dim=-1)
    close(scaled.encode(X), h * (h.abs() >= h.abs().topk(3).values[:, -1:]))


@pytest.mark.parametrize(
    ("architecture", "reason"), [("temporal", "tokens before"), ("matching_pursuit", "a loop"), ("novel", "'novel'")]
)
def test_sae_lens_architectures_that_are_no_encoder_are_refused(tmp_path: Path, architecture: str, reason: str) -> None:
    with pytest.raises(LoadError, match=reason):
        sae_lens(tmp_path, standard(), V6 | {"architecture": architecture})
    with pytest.raises(LoadError, match="covariance_whitening"):
        sae_lens(tmp_path, standard(), V6 | {"normalize_activations": "covariance_whitening"})


def test_sae_lens_jumprelu_compares_before_the_relu(tmp_path: Path) -> None:
    t = standard() | {"threshold": drawn(5, t=(D_SAE,))["t"].abs()}
    coder = sae_lens(tmp_path, t, V6 | {"architecture": "jumprelu"})
    h = encoded(t)
    close(coder.encode(X), h.relu() * (h > t["threshold"]))
    far(coder.encode(X), (h - t["threshold"]).relu())


@pytest.mark.parametrize("rescale", [True, False])
def test_sae_lens_checkpoints_of_batch_topk_keep_what_is_above_their_threshold(tmp_path: Path, rescale: bool) -> None:
    t, threshold = standard(), torch.tensor(1.5, dtype=torch.double)
    how = {"architecture": "matryoshka_batchtopk", "k": 3, "rescale_acts_by_decoder_norm": rescale}
    coder = sae_lens(tmp_path, t | {"topk_threshold": threshold}, V6 | how | {"matryoshka_widths": [4, D_SAE]})
    norm = t["W_dec"].norm(dim=-1)
    h = encoded(t) * (norm if rescale else 1)
    f = h * (h > threshold)
    assert not torch.equal(f, top(h, 3).relu())  # as in training, of each row
    close(coder.encode(X), f)
    close(coder(X), (f / norm if rescale else f) @ t["W_dec"] + t["b_dec"])
    assert coder.facts.groups == (4, D_SAE)


def test_sae_lens_gated_has_no_b_enc(tmp_path: Path) -> None:
    t = standard() | drawn(1, b_gate=(D_SAE,), r_mag=(D_SAE,), b_mag=(D_SAE,))
    del t["b_enc"]
    coder = sae_lens(tmp_path, t, V6 | {"architecture": "gated"})
    u = X - t["b_dec"]
    magnitude = (u @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    close(coder.encode(X), ((u @ t["W_enc"] + t["b_gate"]) > 0) * magnitude)


@pytest.mark.parametrize(
    "architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
)
def test_sae_lens_transcoders_take_nothing_off_their_input_and_leave_the_output_normalised(
    tmp_path: Path, architecture: str
) -> None:
    d_out = D_IN + 2
    t = drawn(0, W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, d_out), b_dec=(d_out,))
    if "skip" in architecture:
        t |= drawn(1, W_skip=(d_out, D_IN))
    if "jumprelu" in architecture:
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


@pytest.mark.parametrize("architecture", ["standard", "topk", "abstopk", "jumprelu", "gated"])
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


@pytest.mark.parametrize(
    ("name", "words"), [("threshold", "extra threshold"), ("input_mean", "extra input_mean"), ("scale", "extra scale")]
)
def test_a_tensor_that_would_be_left_out_is_refused(name: str, words: str) -> None:
    tensors = standard() | {name: torch.zeros(D_SAE if name == "threshold" else D_IN)}
    facts = CoderFacts(kind="standard", d_in=D_IN, d_sae=D_SAE, d_out=D_IN)
    with pytest.raises(LoadError, match=words):
        SparseCoder(facts, tensors)


def test_a_file_with_a_tensor_of_unknown_use_is_refused(tmp_path: Path) -> None:
    t = standard()
    held = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    (tmp_path / "cfg.json").write_text(json.dumps({"activation": "topk", "k": 3}))
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / "sae.safetensors")
    assert read(tmp_path).facts.k == 3
    held["W_skip"] = torch.ones(D_IN, D_IN)  # and skip_connection is not set
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / "sae.safetensors")
    with pytest.raises(LoadError, match="holds W_skip, whose use"):
        read(tmp_path)


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
