"""States that coders and their numbers can be in: several dtypes, features of others, two readers of one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coders import D_IN, D_SAE, rows, standard
from models import build
from prisma_sae import (
    CoderFacts,
    SparseCoder,
    TrainConfig,
    evaluate,
    name_features,
    open_coder,
    read,
    save,
    splice,
    train,
)
from torch import Tensor

from prisma_core import HookedViT, InputError

X = rows()
D = 18  # d_model of the small model


def coder(tensors: dict[str, Tensor], d: int = D_IN, **about: Any) -> SparseCoder:
    n = len(tensors["b_enc"])
    return SparseCoder(CoderFacts(**({"kind": "standard", "d_in": d, "d_sae": n, "d_out": d} | about)), tensors)


@pytest.fixture
def model() -> HookedViT:
    return build().double()


@pytest.mark.parametrize("activation", ["topk", "topk-signed", "topk-abs", "groupmax"])
def test_a_prefix_of_features_that_are_chosen_among_all_is_no_coder(activation: str) -> None:
    """The prefix that was trained has the features of the whole TopK, fewer than k; TopK of the prefix has others."""
    tensors = standard() | {"b_dec": torch.zeros(D_IN)}
    whole = coder(tensors, kind="matryoshka", activation=activation, k=4, groups=(8, 16))
    with pytest.raises(InputError, match=r"depends on all 16.*f\[\.\.\., 8:\] = 0"):
        whole.first(8)
    assert torch.equal(whole.first(D_SAE)(X), whole(X))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_several_dtypes_become_the_one_that_holds_them(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    tensors = standard()
    tensors[name] = tensors[name].to(dtype)
    mixed = coder(tensors)
    widest = torch.float64 if dtype == torch.float64 else torch.float32
    assert {each.dtype for each in mixed.tensors().values()} == {widest}
    W_enc, b_enc, W_dec, b_dec = (tensors[key].double() for key in ("W_enc", "b_enc", "W_dec", "b_dec"))
    expected = (X.double() @ W_enc + b_enc).relu() @ W_dec + b_dec
    assert torch.allclose(mixed(X).double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(read(save(mixed, tmp_path / "coder"))(X), mixed(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.bool])
def test_features_of_another_dtype_are_decoded(dtype: torch.dtype) -> None:
    tensors = standard()
    features = torch.arange(2 * D_SAE).view(2, D_SAE).to(dtype)
    expected = features.double() @ tensors["W_dec"].double() + tensors["b_dec"].double()
    assert torch.allclose(coder(tensors).decode(features).double(), expected, rtol=1e-5, atol=1e-4)


def test_complex_numbers_and_another_inputs_activations_are_refused() -> None:
    plain, normalising = coder(standard()), coder(standard(), normalize="layer_norm")
    with pytest.raises(InputError, match=r"activations \[\.\.\. 6\].*real.*complex64"):
        plain.encode(X * 1j)
    with pytest.raises(InputError, match=r"features \[\.\.\. 16\].*real.*complex64"):
        plain.decode(torch.zeros(2, D_SAE, dtype=torch.complex64))
    for other in (X[:3], X[:1], X[0]):
        with pytest.raises(InputError, match=r"\[4, 16\].*encoded from"):
            normalising.decode(torch.zeros(4, D_SAE), other)


def test_transcoders_that_read_one_place_write_to_several(model: HookedViT) -> None:
    """As the parts of a cross-layer transcoder do."""
    reads, writes = "blocks.0.ln2.hook_normalized", ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    made = {
        name: coder(standard(seed, D, 40), D, kind="transcoder", hook=reads, hook_out=name).double()
        for seed, name in enumerate(writes)
    }
    image = torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(image, names=reads)
    tensors = {name: each.tensors() for name, each in made.items()}

    def written(x: Tensor, at: Any) -> Tensor:
        t = tensors[at.name]
        return (cache[reads] @ t["W_enc"] + t["b_enc"]).relu() @ t["W_dec"] + t["b_dec"]

    expected = model.run_with_hooks(image, hooks=dict.fromkeys(writes, written))
    for order in (list(made.values()), list(made.values())[::-1]):
        with splice(model, order):
            assert torch.allclose(model(image), expected, rtol=1e-10, atol=1e-10)


def test_names_of_half_precision_features_have_the_precision_of_their_numbers() -> None:
    """Sums of a thousand features of 100 are above what float16 holds."""
    activations = torch.full((1000, 1), 100.0, dtype=torch.float16)
    shares = torch.tensor([[0.9, 0.1]]).repeat(1000, 1)
    assert name_features(activations, shares, ["star", "circle"]) == {0: "star"}
    with pytest.raises(InputError, match="at least one"):
        name_features(activations, shares[:, :0], [])


def test_activations_that_are_infinite_are_no_fault_of_the_coder(model: HookedViT) -> None:
    hook = "blocks.0.hook_resid_post"
    image = torch.ones(1, 3, 8, 12, dtype=torch.float64)
    with model.hooks({hook: lambda x, at: x * torch.inf}), pytest.raises(InputError, match=rf"{hook}.*in this model"):
        evaluate(model, coder(standard(0, D, 40), D, hook=hook).double(), image)


def test_rows_that_are_alike_or_beyond_float32_are_told() -> None:
    """Trained on, they would be scaled by the rounding of their mean."""
    pytest.importorskip("overcomplete.sae", reason="needs pip install 'prisma-interp[sae-train]'")
    config = TrainConfig(d_sae=D_SAE, k=4)
    for batch in (X[:1], X[:1].repeat(32, 1), torch.full((64, D_IN), 0.1)):
        with pytest.raises(InputError, match="alike"):
            train([batch, X], config, steps=2)
    with pytest.raises(InputError, match=r"Batch 1 .*float32"):
        train([X, X.double() * 1e200], config, steps=2)


def test_a_name_that_no_disk_takes_is_no_coder() -> None:
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(InputError, match="path"):
            open_coder(name)
