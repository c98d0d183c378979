"""Decompositions under TransformerLens' names and arguments."""

from __future__ import annotations

import prisma_lens
import pytest
import torch
from models import EXACT

from prisma_core import ActivationCache, InputError, UnknownName
from prisma_core.errors.migration import STREAM_METHODS, migration_hint
from prisma_core.transformer.stream import StreamCache


def test_the_base_cache_knows_every_method_of_the_stream():
    """It says of each why it has none, without importing the transformer."""
    methods = {name for name in dir(StreamCache) if not name.startswith("_") and not hasattr(ActivationCache, name)}
    assert {name for name in methods if migration_hint(name) is None} == STREAM_METHODS


def test_neurons_of_the_class_token_are_attributed(vit, image):
    logits, cache = vit.run_with_cache(image)
    stack = cache.stack_neuron_results(pos_slice="cls", incl_remainder=True)
    total = cache.logit_attrs(stack, 3, pos_slice="cls").sum(0) + cache.logit_constant(3)
    torch.testing.assert_close(total, logits[:, 3], **EXACT)


def test_a_mean_pooled_model_says_that_one_token_is_too_few(make, image):
    _, cache = make(pool="avg", with_prefix=True).run_with_cache(image)
    with pytest.raises(InputError, match=r"pools 7 of 7 tokens, and the stack's 1 .* or none"):
        cache.logit_attrs(cache.stack_neuron_results(pos_slice="cls"), 3, pos_slice="cls")


@pytest.mark.parametrize("apply_ln", [False, True])
@pytest.mark.parametrize("outputs", [None, 2])
@pytest.mark.parametrize("pos_slice", [None, "cls", [0, 2]], ids=str)
@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize(
    "facts", [{"scale": True}, {"ln_pool": True}, {"n_parallel": 2}, {"kv_heads": 2, "inner_norm": True}], ids=str
)
def test_projected_components_are_projections_of_components(make, image, facts, layer, pos_slice, outputs, apply_ln):
    if apply_ln and layer == 1 and "n_parallel" in facts:
        pytest.skip("several norms read the stream there")
    _, cache = make(**facts).run_with_cache(image)
    onto = torch.randn(18) if outputs is None else torch.randn(18, outputs)
    given = {"layer": layer, "pos_slice": pos_slice, "apply_ln": apply_ln, "incl_remainder": True}
    for method in (cache.stack_head_results, cache.stack_neuron_results):
        whole = method(**given)
        torch.testing.assert_close(method(**given, project_output_onto=onto), whole @ onto, **EXACT)


@pytest.mark.parametrize("names", [None, "result"])
def test_projected_heads_of_one_source_or_of_cached_results(make, image, names):
    vit = make(kv_heads=2, scale=True)
    _, cache = vit.run_with_cache(image, names=names)
    onto = torch.randn(18)
    given = {} if names else {"source": 2}
    whole = cache.stack_head_results(**given)
    torch.testing.assert_close(cache.stack_head_results(**given, project_output_onto=onto), whole @ onto, **EXACT)
    with pytest.raises(InputError, match=r"Expected project_output_onto \[18\] .* \[17\]"):
        cache.stack_head_results(project_output_onto=torch.randn(17))


def test_projecting_onto_a_class_is_its_attribution(vit, image):
    _, cache = vit.run_with_cache(image)
    direct = cache.stack_neuron_results(pos_slice="cls", apply_ln=True, project_output_onto=vit.W_U[:, 3])
    attrs = cache.logit_attrs(cache.stack_neuron_results(pos_slice="cls"), 3, pos_slice="cls")
    torch.testing.assert_close(direct[..., 0], attrs, **EXACT)


@pytest.mark.parametrize("facts", [{}, {"ln_pool": True}], ids=str)
def test_a_norm_computed_anew_is_the_norm(make, image, facts):
    vit = make(**facts)
    _, cache = vit.run_with_cache(image)
    streams = cache.accumulated_resid()
    expected = vit.ln_pool(vit.ln_final(streams))
    torch.testing.assert_close(cache.apply_ln_to_stack(streams, recompute_ln=True), expected, **EXACT)
    assert (cache.apply_ln_to_stack(streams) - expected).abs().max() > 0.1
    expected = vit.blocks[1].ln2(streams)
    torch.testing.assert_close(cache.apply_ln_to_stack(streams, 1, True, recompute_ln=True), expected, **EXACT)


def test_transformer_lens_names_of_classes(vit, image):
    _, cache = vit.run_with_cache(image)
    stack = cache.decompose_resid()
    ours = cache.logit_attrs(stack, "cat", against=[1, 2, 3])
    assert torch.equal(cache.logit_attrs(stack, tokens="cat", incorrect_tokens=[1, 2, 3]), ours)
    with pytest.raises(InputError, match="classes and tokens, got both"):
        cache.logit_attrs(stack, 1, tokens=1)
    with pytest.raises(InputError, match="against and incorrect_tokens, got both"):
        cache.logit_attrs(stack, 1, 2, incorrect_tokens=2)
    with pytest.raises(InputError, match="Expected the classes"):
        cache.logit_attrs(stack)


@pytest.mark.parametrize("batch_slice", [slice(1, 3), [2, 0], 1, torch.tensor([False, True, True])], ids=str)
def test_some_images_of_a_batch(make, image, batch_slice):
    vit = make(pool="attention")
    _, cache = vit.run_with_cache(image, loss=lambda logits: logits.sum())
    rows = [1] if isinstance(batch_slice, int) else batch_slice
    part = cache.apply_slice_to_batch_dim(batch_slice)
    assert all(torch.equal(part[name], cache[name][rows]) for name in cache)
    assert all(torch.equal(part.grad[name], cache.grad[name][rows]) for name in cache)
    stack = cache.decompose_resid()
    for whole, cut in (
        (cache.logit_attrs(stack, 1), cache.logit_attrs(stack[:, rows], 1, batch_slice=batch_slice)),
        (cache.project_stack(stack), cache.project_stack(stack[:, rows], batch_slice=batch_slice)),
        (cache.apply_ln_to_stack(stack), cache.apply_ln_to_stack(stack[:, rows], batch_slice=batch_slice)),
    ):
        torch.testing.assert_close(cut, whole[:, rows], **EXACT)
    _, alone = vit.run_with_cache(image[:1], remove_batch_dim=True)
    with pytest.raises(InputError, match="no batch axis"):
        alone.apply_slice_to_batch_dim(0)


def test_tokens_that_are_not_in_a_cache(vit, image):
    _, cache = vit.run_with_cache(image, pos=5)
    with pytest.raises(InputError, match="The cls tokens are not in the cache"):
        cache.decompose_resid(pos_slice="cls")
    _, cache = vit.run_with_cache(image)
    with pytest.raises(InputError, match="at least one position, got "):
        cache.decompose_resid(pos_slice=[])
    with pytest.raises(InputError, match="pos_slice=0, got a Tensor"):  # one scale is not that of every token
        cache.apply_ln_to_stack(cache.decompose_resid(), pos_slice=0)
    with pytest.raises(InputError, match=r"batch=3 pos.*got a Tensor \[6, 2, 9, 18\]"):
        cache.logit_attrs(cache.decompose_resid()[:, :2], 0)


def test_several_classes_are_one_product(variant, image):
    _, cache = variant.run_with_cache(image)
    stack = cache.decompose_resid()
    directions = cache.directions(["cat", 2], against="emu")
    assert directions.shape == (2, 7)
    assert not directions[1].any()
    along = cache.project_stack(stack) @ directions.T
    torch.testing.assert_close(along[..., 0], cache.logit_attrs(stack, 0, 2), **EXACT)
    assert torch.equal(cache.directions(4), torch.eye(7)[4:5])
    for wrong, error, words in (([7], UnknownName, "0 to 6"), (torch.randn(2, 5), InputError, r"direction \[7\]")):
        with pytest.raises(error, match=words):
            cache.directions(wrong)


def test_results_carry_no_graph_and_take_one_class_as_several(vit, image):
    logits, cache = vit.run_with_cache(image)
    one = prisma_lens.attribute(vit, cache, "dog")
    several = prisma_lens.attribute(vit, cache, [1, "gnu"], by="head")
    sources = prisma_lens.attribute(vit, cache, [1, "gnu"], by="head source")
    found = (one, several, sources, prisma_lens.logit_lens(vit, cache))
    assert not any(x.requires_grad for each in found for x in (each.values, *each.tensors.values()))
    torch.testing.assert_close(one.values.sum(0) + one.tensors["constant"], logits[:, 1:2], **EXACT)
    whole = several.values.sum((0, 1)) + several.tensors["rest"] + several.tensors["constant"]
    torch.testing.assert_close(whole, logits[:, [1, 4]], **EXACT)
    torch.testing.assert_close(sources.values.sum(2), several.values, **EXACT)
