"""ViT-Prisma's files of all ages: what they compute, where they belong, and the traps in reading them."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import D_IN, D_SAE, class_of, drawn, rows, standard, top
from hostile import RunsCommand, truncate
from prisma_sae import read
from torch import Tensor

from prisma_core import LoadError

CONFIG = "vit_prisma.sae.config.VisionModelSAERunnerConfig"
FIELDS: dict[str, Any] = {
    "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "hook_point_layer": 9,
    "layer_subtype": "hook_resid_post",
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "normalize_activations": "layer_norm",
    "cls_token_only": False,
    "use_patches_only": False,
    "expansion_factor": 64,
    "_device": torch.device("cpu"),
    "_dtype": torch.float32,
}


def write(folder: Path, tensors: dict[str, Tensor], name: str = "weights.pt", **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fields = {key: value for key, value in {**FIELDS, **fields}.items() if value is not ...}
    inner_class = "vit_prisma.configs.HookedViTConfig.HookedViTConfig"
    with class_of(inner_class, n_layers=12) as inner, class_of(CONFIG, **fields, vit_model_cfg=inner) as config:
        torch.save({"cfg": config, "state_dict": tensors}, folder / name)
    text = {key: str(value) if key in ("_device", "_dtype") else value for key, value in fields.items()}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mu = x.sum(-1, keepdim=True) / x.shape[-1]
    deviation = ((x - mu).square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt()  # n - 1
    return (x - mu) / (deviation + 1e-5), mu, deviation


def test_a_standard_coder_computes_what_vit_prisma_computes(tmp_path: Path) -> None:
    t, x = standard(), rows()
    coder = read(write(tmp_path, t))
    u, mu, deviation = layer_norm(x)
    features = torch.relu((u - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    torch.testing.assert_close(coder.encode(x), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coder(x), (features @ t["W_dec"] + t["b_dec"]) * deviation + mu, rtol=1e-5, atol=1e-5)
    biased = (x - mu) / (x.std(-1, keepdim=True, unbiased=False) + 1e-5)
    wrong = torch.relu((biased - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    assert (coder.encode(x) - wrong).abs().max() > 1e-2
    assert coder.facts.kind == "standard"
    assert coder.facts.model == "open_clip:hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"


def test_topk_keeps_k_and_takes_their_relu(tmp_path: Path) -> None:
    t, x = standard(), rows()
    t["b_enc"] -= 12  # so that some of the k largest are negative
    coder = read(
        write(tmp_path, t, activation_fn_str="topk", activation_fn_kwargs={"k": 4}, normalize_activations="none")
    )
    h = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    torch.testing.assert_close(coder.encode(x), top(h, 4).relu())
    assert (top(h, 4) < 0).any()
    assert coder.facts.kind == "topk"


def test_a_gated_coder_has_a_bias_that_nothing_uses(tmp_path: Path) -> None:
    t = standard() | drawn(1, b_gate=(D_SAE,), r_mag=(D_SAE,), b_mag=(D_SAE,))
    x = rows()
    coder = read(write(tmp_path, t, architecture="gated", normalize_activations=None))
    u = x - t["b_dec"]
    gate = (u @ t["W_enc"] + t["b_gate"]) > 0
    expected = gate * torch.relu(u @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"])
    torch.testing.assert_close(coder.encode(x), expected)
    with_bias = gate * torch.relu(u @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"] + t["b_enc"])
    assert (coder.encode(x) - with_bias).abs().max() > 0.1


@pytest.mark.parametrize("skip", [True, False])
def test_a_transcoder_is_brought_back_by_its_inputs_statistics_and_skips_by_the_raw_input(
    tmp_path: Path, skip: bool
) -> None:
    t = standard() | drawn(1, b_dec_out=(D_IN,)) | (drawn(2, W_skip=(D_IN, D_IN)) if skip else {})
    x = rows()
    # The default of this field is True whether there is a connection or not: the tensors say which.
    out: dict[str, Any] = {"is_transcoder": True, "transcoder_with_skip_connection": True}
    out |= {"layer_subtype": "ln2.hook_normalized", "out_hook_point_layer": 9, "layer_out_subtype": "hook_mlp_out"}
    coder = read(write(tmp_path, t, **out))
    u, mu, deviation = layer_norm(x)
    features = torch.relu((u - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    y = features @ t["W_dec"] + t["b_dec_out"]
    y = (y + x @ t["W_skip"].T if skip else y) * deviation + mu
    torch.testing.assert_close(coder(x), y, rtol=1e-5, atol=1e-4)
    assert (coder.facts.hook, coder.facts.hook_out) == ("blocks.9.ln2.hook_normalized", "blocks.9.hook_mlp_out")
    assert coder.is_transcoder
    if skip:
        with pytest.raises(Exception, match="skip connection"):
            coder.decode(features)


def test_constant_norm_rescale(tmp_path: Path) -> None:
    t, x = standard(), rows()
    coder = read(write(tmp_path, t, normalize_activations="constant_norm_rescale"))
    factor = D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    features = torch.relu((x * factor - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    torch.testing.assert_close(coder(x), (features @ t["W_dec"] + t["b_dec"]) / factor, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------- where it belongs


def test_an_explicit_hook_point_of_old_files_counts_and_no_default_stands_in_for_it(tmp_path: Path) -> None:
    old: dict[str, Any] = {"hook_point": "blocks.11.hook_resid_post", "hook_point_layer": 11, "layer_subtype": ...}
    assert read(write(tmp_path / "old", standard(), **old)).facts.hook == "blocks.11.hook_resid_post"
    both = read(write(tmp_path / "both", standard(), hook_point="blocks.3.hook_mlp_out")).facts.hook
    assert both == "blocks.3.hook_mlp_out"
    nothing = write(tmp_path / "nothing", standard(), layer_subtype=...)
    with pytest.raises(LoadError, match="layer_subtype"):
        read(nothing)
    assert read(nothing, hook="blocks.9.hook_mlp_out").facts.hook == "blocks.9.hook_mlp_out"


def test_a_list_of_layers_of_one_is_that_layer_and_of_several_is_refused(tmp_path: Path) -> None:
    assert read(write(tmp_path / "one", standard(), hook_point_layer=[7])).facts.hook == "blocks.7.hook_resid_post"
    with pytest.raises(LoadError, match="hook_point"):
        read(write(tmp_path / "two", standard(), hook_point_layer=[7, 8]))


@pytest.mark.parametrize(
    ("cls", "patches", "tokens"), [(True, False, "cls"), (False, True, "patches"), (False, False, "all")]
)
def test_the_tokens_that_it_was_trained_on(tmp_path: Path, cls: bool, patches: bool, tokens: str) -> None:
    coder = read(write(tmp_path, standard(), cls_token_only=cls, use_patches_only=patches))
    assert coder.facts.tokens == tokens


def test_a_file_that_does_not_say_its_activation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="activation_fn_str"):
        read(write(tmp_path, standard(), activation_fn_str=...))


# -------------------------------------------------------------------- files


def test_the_file_of_the_most_images_is_taken_and_no_sparsities(tmp_path: Path) -> None:
    few, many = standard(1), standard(2)
    write(tmp_path, few, "n_images_99.pt")
    write(tmp_path, many, "n_images_2600058.pt")
    torch.save(torch.zeros(D_SAE), tmp_path / "n_images_2600058_log_feature_sparsity.pt")
    torch.save(torch.zeros(D_SAE), tmp_path / "n_images_9900058_log_feature_sparsity.pt")
    assert torch.equal(read(tmp_path).W_enc, many["W_enc"])
    write(tmp_path, few, "weights.pt")
    assert torch.equal(read(tmp_path).W_enc, few["W_enc"])


def test_a_bare_state_dict_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    write(tmp_path, standard())
    torch.save(standard(3), tmp_path / "weights.pt")
    coder = read(tmp_path)
    assert torch.equal(coder.W_enc, standard(3)["W_enc"])
    assert coder.facts.hook == "blocks.9.hook_resid_post"
    (tmp_path / "config.json").unlink()
    with pytest.raises(LoadError, match=r"config\.json|known format"):
        read(tmp_path / "weights.pt", format="vit_prisma")


def test_gzipped_pickles_and_the_layout_of_sae_lens_2(tmp_path: Path) -> None:
    with class_of(CONFIG, **FIELDS) as config:
        data = pickle.dumps({"cfg": config, "state_dict": standard()})
    (tmp_path / "sae.pkl.gz").write_bytes(gzip.compress(data))
    assert torch.equal(read(tmp_path / "sae.pkl.gz").W_dec, standard()["W_dec"])
    folder = write(tmp_path / "legacy", standard())
    plain = {key: value for key, value in FIELDS.items() if not key.startswith("_")}
    torch.save({"config": plain, "autoencoder": {"state_dict": standard(4)}}, folder / "weights.pt")
    assert torch.equal(read(folder).W_dec, standard(4)["W_dec"])


@pytest.mark.parametrize("name", ["weights.pt", "sae.pkl.gz"])
def test_no_code_of_a_file_runs(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    value = {"cfg": RunsCommand(mark), "state_dict": standard()}
    folder = write(tmp_path / "folder", standard())
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(pickle.dumps(value)))
    else:
        torch.save(value, folder / name)
    with pytest.raises(LoadError, match="mkdir"):
        read(folder / name, format="vit_prisma")
    assert not mark.exists()


def test_a_truncated_file_is_one_error(tmp_path: Path) -> None:
    truncate(write(tmp_path, standard()) / "weights.pt")
    with pytest.raises(LoadError, match=r"weights\.pt"):
        read(tmp_path)
