"""Techniques inside of scopes: what they return is of the model as it is edited, or they refuse in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prisma_lens as lens
import prisma_patch as patch
import pytest
import torch
from models import build
from prisma_lens.covectors import check_total
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, InputError, NotApplicable

X = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1)).double()
INSIDE = {"embeddings": "hook_full_embed", "queries": "blocks.1.attn.hook_q", "values": "blocks.1.attn.hook_v"}
INSIDE |= {"heads": "blocks.1.attn.hook_z", "neurons": "blocks.1.mlp.hook_post"}
BETWEEN = {"stream": "blocks.1.hook_resid_post", "attention": "blocks.1.hook_attn_out", "norm": "hook_ln_final"}
BETWEEN |= {"results": "blocks.1.attn.hook_result", "pooled": "hook_pooled", "output": "hook_logits"}


def model() -> HookedViT:
    return build(registers=2, n_classes=5).double()


def halved(made: HookedViT, name: str) -> Any:
    return made.hooks({name: lambda x, hook: x / 2})


def total(found: prisma.Result) -> Tensor:
    return found.values.sum((0, 1)) + found.tensors["constant"] + found.tensors["rest"]


@pytest.mark.parametrize("name", INSIDE.values(), ids=INSIDE)
def test_attribution_holds_where_a_hook_edits_what_components_are_made_of(name: str) -> None:
    made = model()
    with torch.no_grad(), halved(made, name):
        found, output = lens.attribute(made, X, 1, by="head"), made(X)
    assert torch.allclose(total(found)[:, 0], output[:, 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("call", [lens.attribute, lens.second_order], ids=["attribute", "second_order"])
@pytest.mark.parametrize("name", BETWEEN.values(), ids=BETWEEN)
def test_sums_that_a_hook_breaks_are_refused(name: str, call: Callable[..., Any]) -> None:
    made = model()
    options = {"by": "head"} if call is lens.attribute else {}
    with halved(made, name), pytest.raises(NotApplicable):
        call(made, X, 1, **options)
    call(made, X, 1, **options)


@pytest.mark.parametrize("by", ["layer", "head", "neuron", "source"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_that_are_a_tenth_off_are_refused_in_half_precision(dtype: torch.dtype, by: Any) -> None:
    made, images = model().to(dtype), X.to(dtype)
    found = lens.attribute(made, images, 1, by=by)
    parts, rest = found.values.flatten(0, found.axes.index("batch") - 1), list(found.tensors.values())
    _, cache = made.run_with_cache(images, names="hook_logits")
    read = cache["hook_logits"][:, 1:2]
    check_total(cache, parts, rest, read)
    size = sum((each.float().abs() for each in rest), parts.float().abs().sum(0))
    for sign in (1, -1):
        with pytest.raises(NotApplicable, match="sum to"):
            check_total(cache, parts, rest, read + sign * 0.1 * size)
    with halved(made, "blocks.1.hook_resid_post"), pytest.raises(NotApplicable, match="sum to"):
        lens.attribute(made, images, 1, by=by)


@pytest.mark.parametrize(
    "call", [lens.head_outputs, lambda made, images: lens.mean_ablation(made, images, [0, 1])], ids=["heads", "means"]
)
def test_decompositions_of_the_output_are_refused_where_a_hook_breaks_their_sum(call: Callable[..., Any]) -> None:
    made = model()
    with halved(made, "blocks.1.hook_resid_post"), pytest.raises(NotApplicable, match="sum to"):
        call(made, X)


def test_sources_of_an_ablated_head_are_refused() -> None:
    made = model()
    with patch.ablate(made, ("z", 1), heads=0), pytest.raises(NotApplicable, match="sum to"):
        lens.attribute(made, X, 1, by="source")


def test_a_cache_from_before_the_weights_changed_is_refused() -> None:
    made = model()
    _, cache = made.run_with_cache(X, names=lens.names_for(made, "head"))
    with torch.no_grad():
        made.blocks[0].attn.W_O.mul_(2)
    with pytest.raises(NotApplicable, match="weights changed"):
        lens.attribute(made, cache, 1, by="head")


def test_a_probes_reading_is_refused_where_a_hook_edits_the_stream_before_it() -> None:
    made = model().float()
    images = torch.randn(12, 3, 8, 12, generator=torch.Generator().manual_seed(2))
    probe = lens.probe(made, [(images, torch.arange(12) % 2)], ("resid_post", 1), control=False)
    with halved(made, "blocks.0.hook_resid_post"), pytest.raises(NotApplicable, match="sum to"):
        lens.attribute(made, images, probe)


@pytest.mark.parametrize("name", ["hook_logits", "hook_ln_final", "ln_final.hook_normalized"])
def test_a_lens_is_refused_where_a_scope_is_open_behind_the_stream(name: str) -> None:
    made = model()
    with halved(made, name), pytest.raises(NotApplicable, match=name):
        lens.logit_lens(made, X)


def test_circuits_in_a_scope_are_those_of_the_edited_model() -> None:
    made, edges = model(), ["input->m1", "a0.h1->m1", "m0->a1.h0<v>", "a1.h0->logits"]
    with patch.ablate(made, ("z", 0), heads=1):
        found = patch.edge_effects(made, edges, X, Y, 1).values
    with torch.no_grad():
        made.blocks[0].attn.W_O[1] = 0
    assert torch.allclose(found, patch.edge_effects(made, edges, X, Y, 1).values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp.hook_post", "hook_mlp_out", "hook_attn_out", "hook_resid_mid", "ln2.hook_scale"])
def test_circuits_are_refused_where_a_scope_is_open_in_what_edges_carry(name: str) -> None:
    made = model()
    for call in (lambda: patch.edge_scores(made, X, Y, 1), lambda: patch.edge_effects(made, ["input->m1"], X, Y, 1)):
        with halved(made, f"blocks.1.{name}"), pytest.raises(NotApplicable, match=name):
            call()


def test_circuits_take_at_least_one_pair() -> None:
    with pytest.raises(InputError, match="at least one"):
        patch.edge_scores(model(), X[:0], Y[:0], 1)
