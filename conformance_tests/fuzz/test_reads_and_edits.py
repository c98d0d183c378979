"""What a hook reads does not change what an edit does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import build
from prisma_conformance.strategies import hook_names
from torch import Tensor

from prisma_core.transformer.attention import HeadInputs

from .drawing import Drawn, close, models

ALL_PAIRS: dict[str, dict[str, Any]] = {
    "plain": {"scale": True, "registers": 1},
    "side by side": {"n_parallel": 2},
    "parallel, gated": {"kind": "parallel", "gated": True},
    "res_post": {"kind": "res_post"},
    "no norm": {"norm": None},
    "rope, norms everywhere": {"rope": True, "qk_norm": True, "inner_norm": True, "ln_pool": True},
    "attention pooling, grouped": {"pool": "attention", "kv_heads": 2, "attn_bias": True},
}


def changed(x: Tensor, at: Any) -> Tensor:
    return 1.5 * x + 0.125 * x.roll(1, 0)


def edited(model: Any, inputs: tuple[Tensor, ...], edit: str, *reads: str) -> Tensor:
    """Return the output with an edit at one hook point, while others are read."""
    with model.hooks({edit: changed} | {read: lambda x, at: None for read in reads if read != edit}):
        return model(*inputs)


def cached(model: Any, inputs: tuple[Tensor, ...], edit: str, *reads: str) -> Tensor:
    return model.run_with_cache(*inputs, names=list(reads), hooks={edit: changed})[0]


def forgetful(self: HeadInputs, norm: Any, x: Tensor, normed: Tensor) -> HeadInputs:
    """Norm the inputs of single heads past the hook points of the norm, as if there were none."""
    return HeadInputs(*(None if each is None else norm.fused(each) for each in self))


@given(models(["vision", "text", "dual"]), st.booleans(), st.booleans(), st.data())
def test_reading_changes_no_edit(drawn: Drawn, gradients: bool, by_hooks: bool, data: st.DataObject) -> None:
    edit = data.draw(hook_names(drawn.model))[0]
    with torch.set_grad_enabled(gradients):
        plain = edited(drawn.model, drawn.inputs, edit)
        assert close((edited if by_hooks else cached)(drawn.model, drawn.inputs, edit, *drawn.names), plain)


@pytest.mark.parametrize("kind", ALL_PAIRS)
def test_every_pair_of_a_read_and_an_edit(kind: str, in_float64: None, image: Tensor) -> None:
    model = build(layers=1, **ALL_PAIRS[kind])
    with torch.no_grad():
        for edit in model.hook_points():
            plain = edited(model, (image,), edit)
            different = [read for read in model.hook_points() if not close(cached(model, (image,), edit, read), plain)]
            assert not different, f"an edit at {edit} does something else while these are read: {different}"


def test_a_twin_whose_reads_forget_edits_is_seen(
    in_float64: None, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HeadInputs, "after", forgetful)
    with pytest.raises(AssertionError, match=r"ln1.*hook_q_input"):
        test_every_pair_of_a_read_and_an_edit("plain", None, image)
