"""Files of dictionary_learning and saev, and the traps in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import D_IN, D_SAE, X, close, drawn, encoded, far, saev, standard, top
from prisma_sae import SparseCoder, read
from torch import Tensor

from prisma_core import LoadError

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
