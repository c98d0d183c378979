"""Decompositions of texts, and of pairs of towers: components sum to the stream, the output and the similarity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prisma_conformance.randomise import randomise
from torch import Tensor

from prisma_core import ActivationCache, InputError, ModelSpec, NotApplicable, UnknownName
from prisma_core.spec import (
    AttentionSpec,
    DualSpec,
    MlpSpec,
    NormSpec,
    PoolSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.transformer import HookedDual, HookedText, build

EXACT = {"rtol": 0, "atol": 1e-10}
LN, RMS = NormSpec(eps=1e-3), NormSpec(kind="rms", eps=1e-2)
MEAN = {"pool": TextPoolSpec(kind="avg"), "pad_id": 7}


FACTS: dict[str, Any] = {"norm": LN, "scale": 0.4, "d_mlp": 20, "act": "quick_gelu", "n_classes": 10}


def text_spec(**facts: Any) -> TextSpec:
    return TextSpec.plain(**FACTS | {"n_vocab": 50, "n_ctx": 9} | facts)


def vision_spec(pool: PoolSpec, **facts: Any) -> ModelSpec:
    return ModelSpec.plain(**FACTS | {"d_model": 16, "layers": 3, "ln_pre": LN, "pool": pool} | facts)


def drawn(spec: TextSpec | DualSpec) -> Any:
    return randomise(build(spec).double(), torch.Generator().manual_seed(0)).eval().requires_grad_(False)


def inputs_of(model: HookedDual | HookedText, batch: int = 3) -> list[Tensor]:
    given = model.sample_inputs(batch, generator=torch.Generator().manual_seed(3))
    return [x.double() if x.is_floating_point() else x for x in given]


TEXTS: dict[str, dict[str, Any]] = {
    "argmax": {},
    "eos": {"pool": TextPoolSpec(kind="eos", eos_id=5)},
    "first": {"causal": False, "pool": TextPoolSpec(kind="first")},
    "last": {"causal": False, "pool": TextPoolSpec(kind="last"), "pad_id": 7},
    "all tokens": {"pool": TextPoolSpec(kind="none"), "ln_pool": RMS},
    "mean, both ways": {"causal": False, **MEAN},
    "mean between two norms": {**MEAN, "ln_pool": LN},
    "suffix and slip": {"pool": TextPoolSpec(kind="last"), "suffix": True, "pad_id": 7, "pad_lag": 1},
    "positions by text": {**MEAN, "pos_by_text": True, "causal": False},
    "ln_pre": {"ln_pre": LN, "ln1": RMS, "ln2": RMS},
    "no final norm, no head": {"ln_final": None, "n_classes": None},
    "layer scale, grouped": {"attn_scale": True, "mlp_scale": True, "n_kv_heads": 1},
    "norms behind": {"kind": "res_post"},
}


@pytest.mark.parametrize("name", TEXTS)
def test_components_of_a_text_sum_to_its_stream_and_its_output(name: str) -> None:
    model = drawn(text_spec(**TEXTS[name]))
    (tokens,) = inputs_of(model)
    output, cache = model.run_with_cache(tokens)
    stacks = [cache.decompose_resid(return_labels=True)]
    if name != "norms behind":
        stacks += [
            cache.stack_head_results(incl_remainder=True, return_labels=True),
            cache.stack_neuron_results(incl_remainder=True, return_labels=True, neuron_slice=[0, 7]),
        ]
        brought = [cache.stack_head_results(source=token) for token in range(len(cache.positions() or ()))]
        torch.testing.assert_close(torch.stack(brought).sum(0), cache.stack_head_results(), **EXACT)
    direction = torch.randn(3, output.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    along = torch.einsum("b...c,bc->b...", output, direction)
    for stack, labels in stacks:
        assert len(set(labels)) == len(stack)
        torch.testing.assert_close(stack.sum(0), cache["resid_post", -1], **EXACT)
        torch.testing.assert_close(cache.project_stack(stack).sum(0) + cache.logit_constant(), output, **EXACT)
        total = cache.logit_attrs(stack, direction).sum(0) + cache.logit_constant(direction)
        torch.testing.assert_close(total, along, **EXACT)
        if model.spec.n_classes:
            total = cache.logit_attrs(stack, [1, 0, 4], against=2).sum(0) + cache.logit_constant([1, 0, 4], against=2)
            torch.testing.assert_close(total, output[[0, 1, 2], ..., [1, 0, 4]] - output[..., 2], **EXACT)
        if model.spec.pool.kind != "none":
            by_token = cache.project_stack(stack, per_token=True)
            torch.testing.assert_close(by_token.sum(-2), cache.project_stack(stack), **EXACT)
    torch.testing.assert_close(cache.accumulated_resid()[-1], cache["resid_post", -1], **EXACT)


def test_labels_of_a_text() -> None:
    model = drawn(text_spec())
    _, cache = model.run_with_cache(*inputs_of(model))
    _, labels = cache.decompose_resid(return_labels=True)
    assert labels == ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    assert torch.equal(cache.decompose_resid()[0] + cache.decompose_resid()[1], cache["full_embed"])


def test_only_what_is_read_counts_and_must_be_there() -> None:
    model = drawn(text_spec())
    (tokens,) = inputs_of(model, 1)
    output, cache = model.run_with_cache(tokens)
    end = int(tokens.argmax())
    by_token = cache.project_stack(cache.decompose_resid(), per_token=True)
    assert by_token[:, 0, end].any()
    by_token[:, 0, end] = 0
    assert not by_token.any()
    _, cut = model.run_with_cache(tokens, pos=[end])
    assert cut.positions() == [end]
    torch.testing.assert_close(cut.project_stack(cut.decompose_resid()).sum(0) + cut.logit_constant(), output, **EXACT)
    stack = cache.stack_head_results(pos_slice=[end], incl_remainder=True)
    total = cache.project_stack(stack, pos_slice=[end]).sum(0) + cache.logit_constant()
    torch.testing.assert_close(total, output, **EXACT)
    _, other = model.run_with_cache(tokens, pos=[end - 1])
    with pytest.raises(InputError, match="pools 1 of 9 tokens"):
        other.project_stack(other.decompose_resid())


def test_a_text_without_a_batch_axis_in_a_scope_and_in_a_file(tmp_path: Any) -> None:
    model = drawn(text_spec(**MEAN))
    (tokens,) = inputs_of(model, 1)
    output, cache = model.run_with_cache(tokens, remove_batch_dim=True)
    again = ActivationCache.load(cache.save(tmp_path / "text.safetensors"), model=model)
    assert again.tokens is not None
    assert torch.equal(again.tokens, tokens)
    for each in (cache, again, cache.to(dtype=torch.float64)):
        total = each.project_stack(each.decompose_resid()).sum(0) + each.logit_constant()
        torch.testing.assert_close(total, output[0], **EXACT)
    with model.caching() as scoped:
        model(tokens)
    with pytest.raises(NotApplicable, match=r"cache\.tokens = tokens"):
        scoped.project_stack(scoped.decompose_resid())
    scoped.tokens = tokens
    total = scoped.project_stack(scoped.decompose_resid()).sum(0) + scoped.logit_constant()
    torch.testing.assert_close(total, output, **EXACT)


def test_texts_whose_stream_or_output_is_no_sum_are_refused_in_words() -> None:
    model = drawn(text_spec(kind="post", ln_final=None))
    _, cache = model.run_with_cache(*inputs_of(model))
    assert len(cache.accumulated_resid()) == 3
    assert torch.equal(cache.decompose_resid(0).sum(0), cache["full_embed"])
    stack = cache.accumulated_resid()
    for refused in (
        cache.decompose_resid,
        cache.stack_head_results,
        cache.stack_neuron_results,
        lambda: cache.project_stack(stack),
        lambda: cache.accumulated_resid(apply_ln=True),
        cache.logit_constant,
    ):
        with pytest.raises(NotApplicable, match="Layer 0 norms the stream itself"):
            refused()
    model = drawn(text_spec(head=MlpSpec(d_mlp=6, act="gelu")))
    _, cache = model.run_with_cache(*inputs_of(model))
    stack = cache.decompose_resid()
    torch.testing.assert_close(stack.sum(0), cache["resid_post", 1], **EXACT)
    with pytest.raises(NotApplicable, match="head is an MLP"):
        cache.project_stack(stack)
    model = drawn(text_spec(kind="res_post"))
    _, cache = model.run_with_cache(*inputs_of(model))
    with pytest.raises(NotApplicable, match="ln1 normalises the sum of its heads"):
        cache.stack_head_results(source=1)


# -------------------------------------------------------------------- two towers


ATTENTION = AttentionSpec(n_heads=2, n_kv_heads=2, d_head=6, scale=0.3)
MAP = PoolSpec(kind="attention", attn=ATTENTION, with_prefix=True, mlp=MlpSpec(d_mlp=9, act="gelu"), norm=LN)
DUALS: dict[str, DualSpec] = {
    "CLIP": DualSpec(vision=vision_spec(PoolSpec(kind="token")), text=text_spec()),
    "attentional pooling, bias": DualSpec(
        vision=vision_spec(PoolSpec(kind="attention", attn=ATTENTION), ln_final=None, ln_pool=LN, d_pool=14),
        text=text_spec(**TEXTS["last"]),
        logit_bias=True,
    ),
    "attention and an MLP": DualSpec(vision=vision_spec(MAP), text=text_spec(**TEXTS["eos"]), logit_bias=True),
    "means": DualSpec(vision=vision_spec(PoolSpec(kind="avg")), text=text_spec(**TEXTS["mean between two norms"])),
}


@pytest.mark.parametrize("name", DUALS)
def test_components_of_either_tower_sum_to_the_similarity(name: str) -> None:
    model = drawn(DUALS[name])
    image, tokens = inputs_of(model)  # of other numbers
    logits, cache = model.run_with_cache(image, tokens)
    scale, bias = model.logit_scale.exp(), model.logit_bias if model.spec.logit_bias else 0
    for tower, other in (("vision", "hook_text_embed"), ("text", "hook_image_embed")):
        part = cache.tower(tower)
        length = cache[f"{tower}.hook_logits"].norm(dim=-1)
        for stack in (part.decompose_resid(), part.stack_head_results(incl_remainder=True)):
            parts = (part.project_stack(stack), part.logit_constant()[None])
            adds = [x @ cache[other].T * scale / length[:, None] for x in parts]
            total = adds[0].sum(0) + adds[1][0] + bias
            torch.testing.assert_close(total if tower == "vision" else total.T, logits, **EXACT)


def test_a_tower_of_a_cache_is_the_cache_of_the_tower() -> None:
    model = drawn(DUALS["CLIP"])
    image, tokens = inputs_of(model)
    _, cache = model.run_with_cache(image, tokens, loss=lambda logits: logits.diagonal().sum())
    alone = model.text.run_with_cache(tokens)[1]
    assert list(cache.tower("text")) == list(alone)
    for each in alone:
        torch.testing.assert_close(cache.tower("text")[each], alone[each], **EXACT)
    assert cache.tower("text").grad["z", 0].any()
    seen = cache.tower("vision")
    assert seen.layout == model.vision.layout
    assert torch.equal(seen.patches("resid_post", 1), cache.patches("vision.blocks.1.hook_resid_post"))
    with pytest.raises(UnknownName, match="Did you mean text"):
        cache.tower("texts")
    with pytest.raises(NotApplicable, match="no towers"):
        alone.tower("text")
    _, cut = model.run_with_cache(image, tokens=tokens, pos="cls")  # which no text has
    assert cut["vision.resid_post", 0].shape[1] == 1
    torch.testing.assert_close(cut["text.resid_post", 0], cache["text.resid_post", 0], **EXACT)
    total = cut.tower("text").project_stack(cut.tower("text").decompose_resid()).sum(0)
    torch.testing.assert_close(
        F.normalize(total + cut.tower("text").logit_constant(), dim=-1), cache["hook_text_embed"], **EXACT
    )
    with pytest.raises(InputError, match="does not cut text"):
        model.run_with_cache(image, tokens, names="text.resid_post", pos="cls")
