"""Composition, flow, relevance, induction and the bridge to captum, each against a planted truth and a broken twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import build
from planted import COPIES, READS, RELAY, SOURCE, marked, planted
from planted_dual import planted_dual
from prisma_lens import attention_flow, captum_inputs, composition, induction, integrated_gradients, relevance
from torch import Tensor
from twins import rejects

from prisma_core import HookedViT, InputError, ModelSpec, NotApplicable, UnknownName

BRIGHT = marked(1.0)
METRIC = ("a bright mark", "a dark mark")


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return planted()


# -------------------------------------------------------------------- composition


def test_the_reading_head_composes_its_values_with_the_copying_head(model: HookedViT) -> None:
    def truth(study: Any) -> None:
        found = study(model, "V")
        assert found.top(1)[0][0] == ("L0", f"H{COPIES[1]}", "L1", f"H{READS[1]}")
        assert found.top(1)[0][1] > 3 * found.tensors["baseline"].max()
        assert study(model, "Q").sel(layer=0, head=COPIES[1], later_layer=1, later_head=READS[1]).values < 0.3

    rejects(truth, composition, "scores = own.all_composition_scores(mode)", 'scores = own.all_composition_scores("Q")')


def test_a_score_is_the_norm_of_the_product_over_the_product_of_norms(vit: HookedViT) -> None:
    found = composition(vit, "K")
    ov, qk = vit.W_V[0, 1] @ vit.W_O[0, 1], vit.W_Q[1, 3] @ vit.W_K[1, 3].T
    expected = (ov @ qk.T).norm() / ov.norm() / qk.norm()
    torch.testing.assert_close(found.values[0, 1, 1, 3], expected.detach(), rtol=1e-9, atol=1e-9)
    assert not found.values[1].any()
    assert composition(planted_dual(), "Q", tower="text").shape["layer"] == 1
    with pytest.raises(InputError, match="'K'"):
        composition(vit, "R")


# -------------------------------------------------------------------- flow


def test_the_most_flows_from_the_marked_patch(model: HookedViT) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")

    def truth(study: Any) -> None:
        flow = study(model, BRIGHT, residual=0.0, heads=lambda pattern: pattern.amax(1) - pattern.amin(1))
        assert flow.top(1)[0][0][1] == flow.names("source")[SOURCE]

    rejects(truth, attention_flow, "rows.append(layer * n + key.cpu())", "rows.append(layer * n + query.cpu())")


def test_flows_are_those_of_networkx(model: HookedViT) -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    networkx = pytest.importorskip("networkx", reason="networkx is not installed")
    flow = attention_flow(model, BRIGHT, pos=RELAY, residual=0.3)
    _, cache = model.run_with_cache(BRIGHT, names="pattern")
    graph = networkx.DiGraph()
    for layer in range(2):
        step = 0.3 * torch.eye(10) + 0.7 * cache["pattern", layer][0].float().mean(0)
        for query in range(10):
            for key in range(10):
                graph.add_edge((layer, key), (layer + 1, query), capacity=step[query, key].item())
    theirs = [networkx.maximum_flow_value(graph, (0, source), (2, RELAY)) for source in range(10)]
    torch.testing.assert_close(flow.values[0], torch.tensor(theirs, dtype=torch.float32), rtol=0, atol=1e-4)


def test_a_token_that_is_not_there_has_no_flow(model: HookedViT) -> None:
    with pytest.raises(InputError, match="10"):
        attention_flow(model, BRIGHT, pos=10)
    headless = build(cls=0, pool="avg").float()
    with pytest.raises(InputError, match="r0c0"):
        attention_flow(headless, torch.zeros(1, 3, 8, 12))


# -------------------------------------------------------------------- relevance


def test_relevance_goes_back_to_the_marked_patch(model: HookedViT) -> None:
    def truth(study: Any) -> None:
        found = study(model, BRIGHT, METRIC).sel(pos="cls", batch=0)
        assert {place[0] for place, _ in found.top(2)} == {found.names("source")[at] for at in (SOURCE, RELAY)}

    rejects(truth, relevance, "support @ total", "support.mT @ total")


def test_relevance_by_hand(model: HookedViT) -> None:
    patterns: list[Tensor] = []

    def keep(x: Tensor, at: Any) -> None:
        x.retain_grad()
        patterns.append(x)

    logits = model.run_with_hooks(BRIGHT, hooks={"*hook_pattern": keep})
    (logits[0, 1] - logits[0, 2]).backward()
    one, two = ((x * x.grad)[0].clamp(min=0).mean(0) for x in patterns)
    model.zero_grad()
    torch.testing.assert_close(relevance(model, BRIGHT, METRIC).values[0], one + two + two @ one)


# -------------------------------------------------------------------- induction

SIDE, PIXELS = 4, 12


def inductive() -> HookedViT:
    """A model with an induction circuit written by hand, in float64.

    Layer 0: head 0 attends to the patch to the left and writes its pixels beside each patch's own; head 1 attends to
    patches with the same pixels, and brings them. Layer 1: head 0 attends to patches whose left neighbour has the
    pixels of the query's: what stands to the right of a copy.
    """
    facts = {"d_head": 16, "scale": 1.0, "mlp": None, "n_classes": 2}
    spec = ModelSpec.plain(d_model=48, patch=2, image=8, norm=None, **facts)
    model = HookedViT(spec).double().eval()
    content, shifted = slice(16, 16 + PIXELS), slice(32, 32 + PIXELS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.proj.weight.flatten(1)[content] = torch.eye(PIXELS, dtype=torch.float64)
        model.embed.pos_embed[1:, :16] = torch.eye(16, dtype=torch.float64)
        first, second = model.blocks[0].attn, model.blocks[1].attn
        for place in range(16):
            left = place - 1 if place % SIDE else place
            first.W_Q[0, place, left] = 30.0
            first.W_K[0, place, place] = 1.0
        eye = torch.eye(PIXELS, dtype=torch.float64)
        for attention, at, key in ((first, 1, content), (second, 0, shifted)):
            attention.W_Q[at, content, :PIXELS], attention.W_K[at, key, :PIXELS] = eye, eye
            attention.W_V[at, content, :PIXELS], attention.W_O[at, :PIXELS, content] = eye, eye
        first.W_V[0, content, :PIXELS], first.W_O[0, :PIXELS, shifted] = eye, eye
    return model


def patterned(n: int = 6) -> Tensor:
    """Images whose patches all differ, of pixels that are 1 or -1."""
    return torch.randint(2, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def test_the_induction_heads_are_the_ones_written_by_hand() -> None:
    def truth(study: Any) -> None:
        found = study(inductive(), patterned(), pairs=2)
        assert found.sel(kind="copy").top(1)[0][0] == ("L0", "H1")
        assert found.sel(kind="right").top(1)[0][0] == ("L1", "H0")
        assert found.sel(kind="copy", layer="L0", head="H1").values > 0.3
        assert found.sel(kind="right", layer="L1", head="H0").values > 0.2
        assert found.sel(kind="left", layer="L1", head="H0").values.abs() < 0.05
        assert found.tensors["control"].max() < 0.3

    rejects(truth, induction, "= pixels", "= pixels.flip(-1)")


def test_what_is_copied_is_the_share_of_the_source() -> None:
    found = induction(inductive(), patterned(), pairs=2)
    copied = found.tensors["copied"]
    assert copied.argmax().item() == 1  # layer 0, head 1: it brings the very pixels it looks for
    assert 0.3 < copied[0, 1] < 0.6  # half of its attention is on the copy, the other half on the patch itself
    assert abs(copied[0, 0]) < 0.05  # the head that shifts writes elsewhere


def test_how_many_images_run_at_once_changes_no_score(vit: HookedViT) -> None:
    images = torch.randn(7, 3, 8, 12, dtype=torch.float64)

    whole = induction(vit, images, pairs=1)
    for size in (1, 3):
        parts = induction(vit, images, pairs=1, batch_size=size)
        torch.testing.assert_close(parts.values, whole.values, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(parts.tensors["copied"], whole.tensors["copied"], rtol=1e-9, atol=1e-9)


def test_a_kind_that_no_pair_has_is_no_number() -> None:
    model = HookedViT(ModelSpec.plain(patch=2, image=(2, 12))).eval()
    found = induction(model, torch.randn(3, 3, 2, 12), pairs=2).values
    assert found[3:].isnan().all()
    assert found[:3].isfinite().all()


def test_a_random_model_has_no_induction(vit: HookedViT) -> None:
    found = induction(vit, torch.randn(8, 3, 8, 12, dtype=torch.float64), pairs=2)
    assert found.shape == {"kind": 5, "layer": 2, "head": 4}
    assert found.sel(kind="copy").values.mean().abs() < 0.2
    with pytest.raises(InputError, match="8 patches, and the image has 6"):
        induction(vit, torch.randn(1, 3, 8, 12, dtype=torch.float64))
    with pytest.raises(NotApplicable, match="res_post"):
        induction(build(kind="res_post"), torch.randn(1, 3, 8, 12, dtype=torch.float64), pairs=2)


# -------------------------------------------------------------------- captum


def test_captums_methods_run_on_hook_points(model: HookedViT) -> None:
    attr = pytest.importorskip("captum.attr", reason="captum is not installed")
    images = torch.cat([BRIGHT, marked(-1.0)])

    def truth(bridge: Any) -> None:
        forward, activation = bridge(model, images, METRIC, ("resid_pre", 1))
        theirs = attr.IntegratedGradients(forward).attribute(activation, n_steps=16, method="riemann_middle")
        ours = integrated_gradients(model, images, METRIC, ("resid_pre", 1), steps=16)
        torch.testing.assert_close(theirs.sum(-1), ours.values, rtol=1e-8, atol=1e-8)
        heads = torch.arange(3)[None, None, :, None].expand(1, 10, 3, 8)
        forward, z = bridge(model, images, METRIC, ("z", 1))
        ablated = attr.FeatureAblation(forward).attribute(z, feature_mask=heads)
        assert ablated[0].abs().amax((0, 2)).argmax() == READS[1]

    rejects(truth, captum_inputs, "return activation.to(x)", "return x + 0 * activation")


def test_the_bridge_says_what_it_cannot_take(model: HookedViT) -> None:
    forward, activation = captum_inputs(model, torch.cat([BRIGHT, BRIGHT]), METRIC, ("z", 1))
    with pytest.raises(InputError, match="batch of 2, got 3"):
        forward(torch.cat([activation, activation[:1]]))
    with pytest.raises(UnknownName, match="2 hook points"):
        captum_inputs(model, BRIGHT, METRIC, "z")
