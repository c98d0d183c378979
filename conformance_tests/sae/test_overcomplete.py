"""overcomplete's pickled models, read without overcomplete and without running anything of theirs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coders import rows
from hostile import RunsCommand
from prisma_sae import read

from prisma_core import LoadError

library = pytest.importorskip(
    "overcomplete.sae", reason="overcomplete is not installed: pip install 'prisma-interp[sae-train]'"
)

D, K = 6, 20
X = rows(64)


def trained(model: Any, steps: int = 3) -> Any:
    """Return a model after some passes in training mode, as its trainer leaves it: in training mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.train()
    for seed in range(steps):
        model(rows(64, seed=seed))
    return model


POINTS = rows(12, seed=4)
MODELS: dict[str, Callable[[], Any]] = {
    "TopKSAE": lambda: library.TopKSAE(D, K, top_k=3, device="cpu"),
    "BatchTopKSAE": lambda: library.BatchTopKSAE(D, K, top_k=100, device="cpu"),
    "JumpSAE": lambda: library.JumpSAE(D, K, device="cpu"),
    "batch norm": lambda: library.TopKSAE(
        D, K, top_k=3, encoder_module=library.MLPEncoder(D, K, nb_blocks=0, norm_layer=torch.nn.BatchNorm1d)
    ),
    "multiplier": lambda: library.TopKSAE(D, K, top_k=3, dictionary_params={"use_multiplier": True}),
    "RATopKSAE": lambda: library.RATopKSAE(D, K, points=POINTS, top_k=3, delta=0.5),
    "RAJumpSAE": lambda: library.RAJumpSAE(D, K, points=POINTS, delta=0.5),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_pickled_model_computes_what_it_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fused: bool, parallel: bool
) -> None:
    model = trained(MODELS[name]())
    if fused:
        model.eval()
    torch.save(torch.nn.DataParallel(model) if parallel else model, tmp_path / "sae.pth")
    model.eval()
    with torch.no_grad():
        _, codes, output = model(X)
    for module in [each for each in sys.modules if each.startswith("overcomplete")]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it is an error
    coder = read(tmp_path / "sae.pth", hook="hook_ln_final", tokens="all")
    assert (codes > 0).any()
    torch.testing.assert_close(coder.encode(X), codes, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(coder(X), output, rtol=1e-5, atol=1e-5)
    assert coder.facts.kind == ("archetypal" if name.startswith("RA") else coder.facts.kind)
    assert (coder.facts.hook, coder.facts.tokens) == ("hook_ln_final", "all")


def test_the_running_threshold_itself_is_kept(tmp_path: Path) -> None:
    """It keeps z >= threshold, where JumpReLU keeps z > threshold."""
    model = trained(MODELS["BatchTopKSAE"]()).eval()
    with torch.no_grad():
        model.running_threshold = model.encoder(X)[1][0].max().clone()
        kept = model.encode(X)[1]
    torch.save(model, tmp_path / "sae.pth")
    ours = read(tmp_path / "sae.pth").encode(X)
    assert (kept[0] > 0).sum() == 1
    assert torch.equal(ours > 0, kept > 0)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", ["TopKSAE", "multiplier"])
def test_a_checkpoint_of_universal_sae_is_its_state_dict(tmp_path: Path, name: str, parallel: bool) -> None:
    model = trained(MODELS[name]())
    state = (torch.nn.DataParallel(model) if parallel else model).state_dict()
    optimizer = torch.optim.Adam(model.parameters())
    saved = {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": optimizer.state_dict(),
        "learning_rate": 0.1,
    }
    torch.save(saved, tmp_path / "checkpoint.pth")
    with pytest.raises(LoadError, match="does not say how many features"):
        read(tmp_path / "checkpoint.pth")
    coder = read(tmp_path / "checkpoint.pth", k=3)
    with torch.no_grad():
        _, codes = model.eval().encode(X)
        torch.testing.assert_close(coder.encode(X), codes)
        torch.testing.assert_close(coder(X), model.decode(codes))
    torch.save(model, tmp_path / "whole.pth")
    with pytest.raises(LoadError, match="leave out k=3"):
        read(tmp_path / "whole.pth", k=3)


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("normalization", ["l2", "max_l2", "l1", "max_l1", "identity"])
def test_a_training_ends_behind_a_step(tmp_path: Path, normalization: str, evaluated: bool) -> None:
    """Rows have other lengths then, and what an earlier evaluation fused is no longer the dictionary."""
    model = trained(library.TopKSAE(D, K, top_k=3, dictionary_params={"normalization": normalization}))
    if evaluated:
        model.eval().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02
    torch.save(model, tmp_path / "whole.pth")
    torch.save({"model_state_dict": model.state_dict(), "epoch": 1}, tmp_path / "state.pth")
    stale = model.dictionary._fused_dictionary
    model.eval()
    assert stale is None or (stale - model.get_dictionary()).abs().max() > 0.01
    with torch.no_grad():
        output = model(X)[2]
    assert torch.equal(read(tmp_path / "whole.pth").W_dec, model.get_dictionary())
    torch.testing.assert_close(read(tmp_path / "whole.pth")(X), output)
    torch.testing.assert_close(read(tmp_path / "state.pth", k=3, normalization=normalization)(X), output)
    if normalization == "l2":  # the default of overcomplete's, which rows of about length 1 tell
        torch.testing.assert_close(read(tmp_path / "state.pth", k=3)(X), output)
    else:
        with pytest.raises(LoadError, match=r"rows of length .* normalization="):
            read(tmp_path / "state.pth", k=3)


def test_models_that_are_no_linear_encoder_or_were_never_trained_are_refused(tmp_path: Path) -> None:
    refused = {
        "MpSAE": library.MpSAE(D, K, k=2),
        "hidden": library.TopKSAE(D, K, encoder_module="mlp_bn_3"),
        "LayerNorm": library.TopKSAE(D, K, encoder_module="mlp_ln_1"),
        "running threshold": library.BatchTopKSAE(D, K),
    }
    for word, model in refused.items():
        torch.save(model, tmp_path / "sae.pth")
        with pytest.raises(LoadError, match=word):
            read(tmp_path / "sae.pth")


def test_a_pickle_that_names_anything_else_is_refused(tmp_path: Path) -> None:
    model = MODELS["TopKSAE"]()
    model.note = RunsCommand(tmp_path / "ran")
    torch.save(model, tmp_path / "sae.pth")
    with pytest.raises(LoadError, match="mkdir"):
        read(tmp_path / "sae.pth")
    assert not (tmp_path / "ran").exists()
