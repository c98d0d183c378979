"""A spec said in one line: what is plain, and what is given by name."""

from __future__ import annotations

import doctest

import pytest
import torch

from prisma_core import HookedViT, InputError, ModelSpec, SpecError
from prisma_core.spec import NormSpec, PoolSpec, RopeSpec, TextPoolSpec, TextSpec, models
from prisma_core.transformer import HookedText

NORM = NormSpec(kind="rms", eps=0.25)


def test_examples_in_docstrings_hold():
    result = doctest.testmod(models)
    assert result.attempted >= 4
    assert not result.failed


def test_sizes_are_those_asked_for():
    spec = ModelSpec.plain(d_model=15, layers=3, heads=5, patch=(2, 4), image=12, n_classes=7)
    assert (spec.d_model, spec.n_layers, spec.image_size, spec.n_classes) == (15, 3, (12, 12), 7)
    assert (spec.layout.rows, spec.layout.columns, spec.layout.n_tokens) == (6, 3, 19)
    attn, mlp = spec.blocks[2].attn, spec.blocks[2].mlp
    assert (attn.n_heads, attn.n_kv_heads, attn.d_head, attn.scale) == (5, 5, 3, 3**-0.5)
    assert mlp is not None
    assert (mlp.d_mlp, mlp.act, mlp.gated) == (60, "gelu", False)


def test_each_fact_goes_to_the_part_that_has_it():
    spec = ModelSpec.plain(
        norm=NORM, cls=0, registers=2, pos=False, kind="parallel", gated=True, d_mlp=9, n_kv_heads=1, d_head=4,
        inner_norm=NORM, rope=RopeSpec(layout="half"), pool="avg", with_prefix=True,
    )  # fmt: skip
    block = spec.blocks[1]
    assert (spec.layout.cls, spec.layout.registers) == (0, 2)
    assert (spec.embed.pos, spec.rope) == (False, RopeSpec(layout="half"))
    assert (block.kind, block.ln1, block.ln2, spec.ln_final) == ("parallel", NORM, None, NORM)
    assert (block.attn.n_kv_heads, block.attn.d_head, block.attn.scale, block.attn.inner_norm) == (1, 4, 0.5, NORM)
    assert block.mlp is not None
    assert (block.mlp.gated, block.mlp.d_mlp, block.mlp.inner_norm) == (True, 9, NORM)
    assert spec.pool == PoolSpec(kind="avg", with_prefix=True)


@pytest.mark.parametrize(
    ("facts", "width"),
    [
        ({"pool": "token_and_avg"}, 24),
        ({"pool": "attention", "n_latents": 3}, 12),
        ({"mlp": None}, 12),
        ({"norm": None, "n_classes": None}, 12),
        ({"tubelet": 2, "frames": 2}, 12),
        ({"pool": PoolSpec(kind="none"), "ln_pool": NORM}, 12),
    ],
    ids=str,
)
def test_what_it_says_can_be_built_and_run(facts, width):
    vit = HookedViT(ModelSpec.plain(**facts))
    assert vit.spec.d_pool == width
    assert torch.isfinite(vit(*vit.sample_inputs(2))).all()


def test_texts():
    spec = TextSpec.plain(d_model=10, heads=5, n_vocab=30, n_ctx=6, n_kv_heads=1, act="quick_gelu", pool="first")
    assert (spec.n_vocab, spec.n_ctx, spec.n_classes, spec.pool) == (30, 6, 10, TextPoolSpec(kind="first"))
    assert spec.blocks[0].attn.n_kv_heads == 1
    text = HookedText(spec)
    assert text(*text.sample_inputs(2)).shape == (2, 10)


@pytest.mark.parametrize(("name", "near"), [("register", "registers"), ("n_class", "n_classes"), ("gate", "gated")])
def test_a_fact_nobody_has_is_an_error_with_the_nearest(name, near):
    with pytest.raises(InputError, match=rf"No fact '{name}' in ModelSpec, .* Did you mean .*{near}"):
        ModelSpec.plain(**{name: 2})


def test_facts_that_contradict_each_other():
    with pytest.raises(SpecError, match="two heads"):
        ModelSpec.plain(pool="avg", distillation=1, n_heads_out=2)
