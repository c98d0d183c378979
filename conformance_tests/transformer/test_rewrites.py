"""Rewrites leave the logits where they are, do what they say, and refuse where they do not hold."""

from __future__ import annotations

import pytest
import torch
from models import VARIANTS

from prisma_core import NotApplicable
from prisma_core.transformer.rewrites import (
    center_writing_weights,
    fold_layer_norm,
    fold_layer_scale,
    fold_value_biases,
    refactor_factored_attn_matrices,
    rewrite,
)

REWRITES = [
    fold_layer_norm,
    fold_layer_scale,
    center_writing_weights,
    fold_value_biases,
    refactor_factored_attn_matrices,
]
FACTS = {
    **VARIANTS,
    "qk_norm": {"qk_norm": True},
    "rope": {"rope": True},
    "attention bias": {"attn_bias": True},
    "attention pooling": {"pool": "attention"},
    "factorized positions": {"factorized": True},
    "first token and mean": {"pool": "token_and_avg"},
    "no head": {"n_classes": None},
}

REFUSED = {
    fold_layer_norm: {"res_post"},
    fold_layer_scale: {"res_post"},
    center_writing_weights: {
        "rms, glu",
        "no norms at all",
        "res_post",
        "res_post without norm",
    },
    fold_value_biases: {"inner norms"},
    refactor_factored_attn_matrices: {
        "inner norms",
        "qk_norm",
        "rope",
        "rope, qk_norm, bias",
        "attention only, grouped",
    },
}


@pytest.mark.parametrize("facts", FACTS)
@pytest.mark.parametrize("how", REWRITES, ids=lambda how: how.__name__)
def test_the_logits_stay_or_the_rewrite_is_refused(make, image, how, facts):
    vit = make(**FACTS[facts])
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    if facts in REFUSED[how]:
        with pytest.raises(NotApplicable):
            rewrite(vit, how)
        return
    new = rewrite(vit, how)
    wanted = vit(image)
    assert (new(image) - wanted).abs().max() <= 1e-10 * wanted.std()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    storages = {tensor.untyped_storage().data_ptr() for tensor in vit.state_dict().values()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in new.state_dict().values()}
    assert new.spec == vit.spec
    assert new.labels == vit.labels


@pytest.mark.parametrize("facts", [{}, {"scale": True, "n_parallel": 2}, {"pool": "avg", "ln_pool": True}])
def test_all_of_them_together(make, image, facts):
    vit = make(**facts)
    new = rewrite(vit, *REWRITES)
    wanted = vit(image)
    assert (new(image) - wanted).abs().max() <= 1e-10 * wanted.std()


def norms_of(vit, *, but=()):
    return {name: norm for name, norm in vit.named_modules() if hasattr(norm, "hook_scale") and name not in but}


@pytest.mark.parametrize("facts", ["plain", "parallel", "side by side", "inner norms", "rms, glu", "two heads"])
def test_a_folded_norm_only_centres_and_scales(make, facts):
    for name, norm in norms_of(rewrite(make(**FACTS[facts]), fold_layer_norm)).items():
        assert norm.weight.eq(1).all(), name
        assert norm.bias is None or norm.bias.eq(0).all(), name


def test_norms_that_nothing_linear_reads_stay(make):
    vit = make(pool="avg", ln_pool=True, ln_pre=True)
    new = rewrite(vit, fold_layer_norm)
    for name in ("ln_final", "ln_pre"):
        assert torch.equal(new.get_submodule(name).weight, vit.get_submodule(name).weight)
    assert new.ln_pool.weight.eq(1).all()


@pytest.mark.parametrize("facts", [{"registers": 2}, {"factorized": True}])
def test_a_centred_stream_has_no_mean(make, image, facts):
    vit = make(scale=True, **facts)
    _, cache = rewrite(vit, center_writing_weights).run_with_cache(image, names=["resid_pre", "resid_post", "mlp_out"])
    _, old = vit.run_with_cache(image, names="resid_post")
    for name, activation in cache.items():
        assert activation.mean(-1).abs().max() < 1e-12, name
    assert old["resid_post", 1].mean(-1).abs().max() > 1e-3


def test_folded_value_biases_are_zero(make, image):
    new = rewrite(make(kv_heads=2), fold_value_biases)
    assert all(block.attn.b_V.eq(0).all() for block in new.blocks)
    _, cache = new.run_with_cache(image, names="result")
    assert len(cache) == 2


def test_refactored_attention_has_orthogonal_columns(make, image):
    vit = make()
    new = rewrite(vit, refactor_factored_attn_matrices)
    _, before = vit.run_with_cache(image)
    _, after = new.run_with_cache(image)
    for layer in range(2):
        torch.testing.assert_close(after["attn_scores", layer], before["attn_scores", layer], rtol=1e-10, atol=1e-10)
    for block in new.blocks:
        gram = block.attn.W_O @ block.attn.W_O.mT
        torch.testing.assert_close(gram, torch.eye(6).expand(4, 6, 6), rtol=1e-10, atol=1e-10)
        q = torch.cat([block.attn.W_Q, block.attn.b_Q[:, None]], dim=1)
        gram = q.mT @ q
        torch.testing.assert_close(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2)), rtol=1e-9, atol=1e-9)
        assert (gram.diagonal(dim1=1, dim2=2).diff() <= 0).all()


def test_reasons_are_given(make):
    for facts, how, words in (
        ({"kind": "res_post"}, fold_layer_norm, "blocks.0 is a res_post block"),
        ({"norm": None, "ln_final": False}, center_writing_weights, r"blocks.0.attn reads the stream through no norm"),
        ({"rope": True}, refactor_factored_attn_matrices, "Rotary positions"),
        ({"qk_norm": True}, refactor_factored_attn_matrices, "norms queries and keys"),
        ({"kv_heads": 2}, refactor_factored_attn_matrices, "shares 2 key heads between 4"),
        ({"inner_norm": True}, fold_value_biases, "norms z before the output projection"),
    ):
        with pytest.raises(NotApplicable, match=words):
            rewrite(make(**facts), how)


def test_pure_functions_leave_the_state_they_are_given(make):
    vit = make(scale=True)
    state = vit.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    for how in REWRITES:
        assert set(how(vit.spec, state)) == set(state)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
