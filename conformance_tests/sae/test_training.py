"""Training through overcomplete: a planted dictionary comes back, and what is trained is saved, loaded and used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import rows
from prisma_sae import SparseCoder, TrainConfig, read, save, train, training
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from prisma_core import InputError

pytest.importorskip("overcomplete.sae", reason="needs pip install 'prisma-interp[sae-train]'")

D, ATOMS, ON = 32, 20, 2


def dictionary() -> Tensor:
    atoms = torch.randn(ATOMS, D, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(atoms, dim=1)


def planted(seed: int = 1, batch: int = 256) -> Iterator[Tensor]:
    """Yield rows that are sums of two atoms of the dictionary, and an offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        on = torch.rand(batch, ATOMS, generator=generator).argsort(1)[:, :ON]
        sizes = 0.5 + torch.rand(batch, ON, generator=generator)
        yield torch.zeros(batch, ATOMS).scatter(1, on, sizes) @ dictionary() + 0.3


def recovered(coder: SparseCoder) -> float:
    """Return the share of atoms that a feature of their own has, whatever the order."""
    cosines = dictionary() @ torch.nn.functional.normalize(coder.W_dec, dim=1).T
    pairs = linear_sum_assignment(-cosines.numpy())
    return float((cosines[pairs] > 0.9).float().mean())


def dense_twin() -> Iterator[Tensor]:
    """Yield rows with the same mean and covariance, in which no dictionary is planted."""
    sample = torch.cat([next(planted(seed)) for seed in range(20)])
    mean, root = sample.mean(0), torch.linalg.cholesky(sample.T.cov() + 1e-6 * torch.eye(D))
    generator = torch.Generator().manual_seed(2)
    while True:
        yield torch.randn(256, D, generator=generator) @ root.T + mean


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "matryoshka", "archetypal"])
def test_a_planted_dictionary_is_recovered_up_to_permutation(kind: Any) -> None:
    config = TrainConfig(kind=kind, d_sae=40, k=ON, lr=1e-2 if kind == "jumprelu" else 3e-3, points=512)
    coder = train(planted(), config, steps=500)
    assert recovered(coder) == 1
    x = next(planted(seed=5))
    assert (coder.encode(x) > 0).float().sum(1).mean() < 2 * ON
    assert 1 - (x - coder(x)).square().sum() / (x - x.mean(0)).square().sum() > 0.9


def test_nothing_is_recovered_where_nothing_was_planted_or_nothing_was_trained() -> None:
    config = TrainConfig(d_sae=40, k=ON, lr=3e-3)
    assert recovered(train(dense_twin(), config, steps=500)) < 0.3
    assert recovered(train(planted(), config, steps=1)) < 0.3


def test_several_coders_are_trained_from_one_read_as_they_are_alone() -> None:
    configs = {"small": TrainConfig(d_sae=8, k=2), "large": TrainConfig(d_sae=24, k=2, seed=3)}
    read_rows: list[int] = []

    def counted() -> Iterator[Tensor]:
        for index, batch in enumerate(planted()):
            read_rows.append(index)
            yield batch

    losses: list[dict[str, float]] = []
    together = train(counted(), configs, steps=5, progress=lambda step, loss: losses.append(dict(loss)))
    assert read_rows == list(range(5))
    assert [set(loss) for loss in losses] == [{"small", "large"}] * 5
    for name, config in configs.items():
        alone = train(planted(), config, steps=5)
        assert all(torch.equal(alone.tensors()[key], value) for key, value in together[name].tensors().items())


def test_what_is_trained_knows_where_it_belongs_and_sae_lens_can_load_it(tmp_path: Path) -> None:
    about = {"model": "toy:scenes-3l", "hook": "blocks.1.hook_resid_post", "tokens": "patches"}
    config = TrainConfig(kind="matryoshka", d_sae=16, k=3)
    x = rows(64)
    coder = train((rows(64, seed=seed) for seed in range(9)), config, steps=9, about=about)
    assert coder.facts.groups == (2, 4, 8, 16)
    folder = save(coder, tmp_path / "coder")
    again = read(folder)
    assert again.facts == coder.facts
    assert (again.facts.model, again.facts.tokens) == ("toy:scenes-3l", "patches")
    (folder / "prisma.json").unlink()
    theirs = read(folder)
    assert torch.equal(theirs(x), coder(x))
    assert theirs.facts.hook == about["hook"]


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "matryoshka", "archetypal"])
def test_every_kind_is_saved_as_sae_lens_has_it_too(tmp_path: Path, kind: Any) -> None:
    x = rows(64)
    coder = train(
        (rows(64, seed=seed) for seed in range(20)), TrainConfig(kind=kind, d_sae=16, k=3, points=64), steps=9
    )
    folder = save(coder, tmp_path)
    kept = load_file(folder / "sae_weights.safetensors")
    threshold = {"threshold"} if kind in ("batchtopk", "jumprelu") else set[str]()
    assert {name: len(kept[name]) for name in kept.keys() & {"b_enc", "threshold"}} == dict.fromkeys(
        {"b_enc"} | threshold, 16
    )
    assert kept.keys() == {"W_enc", "b_enc", "W_dec", "b_dec"} | threshold  # SAELens refuses others, and one number
    assert torch.equal(read(folder)(x), coder(x))
    (folder / "prisma.json").unlink()
    assert torch.equal(read(folder)(x), coder(x))


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([rows(8), rows(8)], "after 2 batches of 4"),
        ([rows(8), rows(8, 5)], "6 numbers, batch 1 of 5"),
        ([rows(8), rows(8) / 0], "NaN or infinite"),
        ([torch.ones(8, 6, dtype=torch.long)], "int64"),
        (["rows"], "got 'rows'"),
        ([rows(8)[:0]], "Batch 0 holds no rows"),
        ([rows(8), rows(8)[:0]], "Batch 1 holds no rows"),
        ([rows(8) * 1e30] * 4, "too large for float32"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_one_error(batches: list[Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        train(batches, TrainConfig(d_sae=8, k=2), steps=4)


def test_a_training_that_diverges_ends_where_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {"good": TrainConfig(d_sae=8, k=2), "bad": TrainConfig(d_sae=8, k=2, lr=0.5)}
    step, taken = training._Run.step, list[float]()

    def diverging(run: Any, batch: torch.Tensor) -> float:
        taken.append(run.config.lr)
        return math.nan if taken.count(0.5) == 3 else step(run, batch)

    monkeypatch.setattr(training._Run, "step", diverging)
    with pytest.raises(InputError, match=r"loss of 'bad' is nan at step 3: give a lower lr="):
        train([rows(8)] * 9, configs, steps=9)
    assert len(taken) == 6


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="d_sae=8"):
        train([rows(8)], TrainConfig(d_sae=8, k=9), steps=1)
    with pytest.raises(InputError, match="step"):
        train([rows(8)], TrainConfig(d_sae=8, k=2), steps=0)
    nested = TrainConfig(kind="matryoshka", d_sae=8, k=2, groups=(2, 8))
    assert train([rows(8)], nested, steps=1).facts.groups == (2, 8)
    for change in ({"groups": (4, 2, 8)}, {"groups": (2, 4)}, {"kind": "topk"}):
        with pytest.raises(InputError, match="d_sae=8"):
            train([rows(8)], nested.model_copy(update=change), steps=1)


def test_facts_that_no_coder_has_are_refused_before_anything_is_read() -> None:
    def never() -> Any:
        raise AssertionError
        yield

    for about, words in (({"layer": 3}, "layer"), ({"hook": 3}, "hook.*not 3"), ({"tokens": "some"}, "tokens")):
        with pytest.raises(InputError, match=words):
            train(never(), TrainConfig(d_sae=8, k=2), steps=1, about=about)
