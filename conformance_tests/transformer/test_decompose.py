"""Decompositions of the residual stream sum to what they decompose."""

from __future__ import annotations

import ast

import pytest
import torch
from models import EXACT
from torch import Tensor

from prisma_core import HookedViT, InputError, ModelSpec, NotApplicable, UnknownName
from prisma_core.spec import AttentionSpec, MlpSpec, NormSpec, PoolSpec

CLASSES = [1, 2, 5]


def is_post_norm(vit) -> bool:
    return vit.spec.blocks[0].kind == "res_post" and vit.spec.blocks[0].ln1 is not None


def wanted(logits: Tensor, classes) -> Tensor:
    return logits[torch.arange(len(logits)), ..., classes]


def stacks(vit, cache):
    yield cache.decompose_resid(return_labels=True)
    if not is_post_norm(vit):
        yield cache.stack_head_results(return_labels=True, incl_remainder=True)
        yield cache.stack_neuron_results(return_labels=True, incl_remainder=True, neuron_slice=slice(2, 5))


def test_components_sum_to_the_stream_and_to_the_logits(variant, image):
    logits, cache = variant.run_with_cache(image)
    for stack, labels in stacks(variant, cache):
        assert len(set(labels)) == len(labels) == len(stack)
        torch.testing.assert_close(stack.sum(0), cache["resid_post", -1], **EXACT)
        total = cache.logit_attrs(stack, CLASSES).sum(0) + cache.logit_constant(CLASSES)
        torch.testing.assert_close(total, wanted(logits, CLASSES), **EXACT)
        total = cache.logit_attrs(stack, CLASSES, "emu").sum(0) + cache.logit_constant(CLASSES, "emu")
        torch.testing.assert_close(total, wanted(logits, CLASSES) - logits[..., 2], **EXACT)


ATTENTION = AttentionSpec(n_heads=3, n_kv_heads=3, d_head=4, scale=0.4)
POOLS = {
    "attention": {"attn": ATTENTION},
    "attention, prefix too": {"attn": ATTENTION, "with_prefix": True},
    "attention, the mean of two latents": {"attn": ATTENTION, "n_latents": 2, "latents": "mean", "d_latent": 10},
    "attention and an MLP": {
        "attn": ATTENTION,
        "n_latents": 2,
        "mlp": MlpSpec(d_mlp=8, act="gelu"),
        "norm": NormSpec(eps=1e-2),
    },
    "token_and_avg": {},
}


@pytest.mark.parametrize("ln_pool", [False, True])
@pytest.mark.parametrize("kind", POOLS)
def test_pooling_by_attention_and_side_by_side_is_read_too(make, image, kind, ln_pool):
    pool = PoolSpec.model_validate({"kind": kind.partition(",")[0].partition(" and ")[0], **POOLS[kind]})
    width = 14 if pool.kind == "attention" and pool.mlp is None else 18 if pool.kind == "attention" else 36
    spec = make(registers=1).spec.model_copy(
        update={"pool": pool, "d_pool": width, "ln_pool": NormSpec(eps=1e-2) if ln_pool else None}
    )
    vit = HookedViT(ModelSpec.model_validate(spec.model_dump()))
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    logits, cache = vit.run_with_cache(image)
    for stack, _ in stacks(vit, cache):
        total = cache.logit_attrs(stack, CLASSES).sum(0) + cache.logit_constant(CLASSES)
        torch.testing.assert_close(total, wanted(logits, CLASSES), **EXACT)
        torch.testing.assert_close(cache.project_stack(stack).sum(0) + cache.logit_constant(), logits, **EXACT)
        by_token = cache.logit_attrs(stack, CLASSES, per_token=True)
        torch.testing.assert_close(by_token.sum(-1), cache.logit_attrs(stack, CLASSES), **EXACT)
    _, alone = vit.run_with_cache(image[:1], remove_batch_dim=True)
    total = alone.project_stack(alone.decompose_resid()).sum(0) + alone.logit_constant()
    torch.testing.assert_close(total, logits[0], **EXACT)


def test_directions_in_the_output_stand_for_classes(variant, image):
    logits, cache = variant.run_with_cache(image)
    directions = torch.randn(3, 7)
    for given in (directions[0], directions):
        along = torch.einsum("b...c,bc->b...", logits, given.expand(3, 7))
        for stack, _ in stacks(variant, cache):
            total = cache.logit_attrs(stack, given, 2).sum(0) + cache.logit_constant(given, 2)
            torch.testing.assert_close(total, along - logits[..., 2], **EXACT)
            whole = cache.project_stack(stack).sum(0) + cache.logit_constant()
            torch.testing.assert_close(whole, logits, **EXACT)
            parts = cache.project_stack(stack, per_token=True)
            if variant.spec.pool.kind != "none":
                torch.testing.assert_close(parts.sum(-2), cache.project_stack(stack), **EXACT)


def test_what_heads_bring_from_each_token_sums_to_what_they_bring(variant, image):
    if is_post_norm(variant) or variant.spec.blocks[0].attn.inner_norm is not None:
        pytest.skip("a norm between heads and stream")
    _, cache = variant.run_with_cache(image)
    n = cache.layout.n_tokens
    brought = torch.stack([cache.stack_head_results(source=token) for token in range(n)])
    torch.testing.assert_close(brought.sum(0), cache.stack_head_results(), **EXACT)
    cut = cache.stack_head_results(source=2, pos_slice=[3])
    torch.testing.assert_close(cut[..., 0, :], brought[2][..., 3, :], **EXACT)
    with pytest.raises(InputError, match=f"No token {n}"):
        cache.stack_head_results(source=n)
    _, part = variant.run_with_cache(image, pos=0)
    with pytest.raises(NotApplicable, match=r"hook_v holds 1 of .* cache all of them"):
        part.stack_head_results(source=0)


def test_heads_alone_sum_to_attn_out_without_bias(make, image):
    vit = make(n_parallel=2, scale=True)
    _, cache = vit.run_with_cache(image)
    stack, labels = cache.stack_head_results(return_labels=True)
    assert labels == [f"L{layer}H{head}" for layer in range(2) for head in range(8)]
    for layer, block in enumerate(vit.blocks):
        bias = sum(scale.gamma * attn.b_O for scale, attn in zip(block.ls1, block.attn, strict=True))
        of_layer = stack[layer * 8 : layer * 8 + 8].sum(0) + bias
        torch.testing.assert_close(of_layer, cache["attn_out", layer], **EXACT)


@pytest.mark.parametrize("facts", [{}, {"inner_norm": True}], ids=["plain", "inner norm"])
def test_head_results_come_from_z_or_from_result_alike(make, image, facts):
    vit = make(**facts)
    without = vit.run_with_cache(image)[1].stack_head_results()
    cached = vit.run_with_cache(image, names="result")[1].stack_head_results()
    torch.testing.assert_close(without, cached, **EXACT)


def test_neurons_alone_sum_to_mlp_out_without_bias(make, image):
    vit = make(scale=True, gated=True)
    _, cache = vit.run_with_cache(image)
    stack, labels = cache.stack_neuron_results(return_labels=True)
    assert labels[:2] == ["L0N0", "L0N1"]
    assert labels[-1] == "L1N19"
    for layer, block in enumerate(vit.blocks):
        total = stack[layer * 20 : layer * 20 + 20].sum(0) + block.ls2.gamma * block.mlp.b_out
        torch.testing.assert_close(total, cache["mlp_out", layer], **EXACT)


@pytest.mark.parametrize(
    ("facts", "labels"),
    [
        ({}, ["embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]),
        ({"ln_pre": True}, ["ln_pre", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]),
        ({"pos": False, "mlp": False}, ["embed", "0_attn_out", "1_attn_out"]),
    ],
)
def test_labels(make, image, facts, labels):
    _, cache = make(**facts).run_with_cache(image)
    assert cache.decompose_resid(return_labels=True)[1] == labels


def test_layers_and_modes(vit, image):
    _, cache = vit.run_with_cache(image)
    torch.testing.assert_close(cache.decompose_resid(1).sum(0), cache["resid_pre", 1], **EXACT)
    torch.testing.assert_close(cache.decompose_resid(1, mlp_input=True).sum(0), cache["resid_mid", 1], **EXACT)
    assert cache.decompose_resid(0, return_labels=True)[1] == ["embed", "pos_embed"]
    assert cache.decompose_resid(mode="attn", incl_embeds=False, return_labels=True)[1] == ["0_attn_out", "1_attn_out"]
    assert cache.decompose_resid(mode="mlp", return_labels=True)[1] == ["embed", "pos_embed", "0_mlp_out", "1_mlp_out"]
    assert torch.equal(cache.stack_head_results(1), cache.stack_head_results()[:4])
    with pytest.raises(InputError, match="No layer 3: expected 0 to 2"):
        cache.decompose_resid(3)
    with pytest.raises(InputError, match="give the layer"):
        cache.decompose_resid(mlp_input=True)
    with pytest.raises(InputError, match="No heads before layer 0"):
        cache.stack_head_results(0)


def test_accumulated(vit, image):
    _, cache = vit.run_with_cache(image)
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    names = [("resid_pre", 0), ("resid_mid", 0), ("resid_pre", 1), ("resid_mid", 1), ("resid_post", 1)]
    assert torch.equal(stack, torch.stack([cache[name] for name in names]))
    _, labels = cache.accumulated_resid(1, mlp_input=True, return_labels=True)
    assert labels == ["0_pre", "1_pre", "1_mid"]


@pytest.mark.parametrize("facts", [{}, {"norm": "rms"}], ids=["ln", "rms"])
def test_a_norm_applied_inside_the_stream(make, image, facts):
    vit = make(**({"norm": NormSpec(kind="rms", eps=0.1)} if facts else {}))
    _, cache = vit.run_with_cache(image)
    for args, name in (((1, False), ("ln1.normalized", 1)), ((1, True), ("ln2.normalized", 1))):
        norm = vit.blocks[1].ln2 if args[1] else vit.blocks[1].ln1
        total = cache.decompose_resid(args[0], mlp_input=args[1], apply_ln=True).sum(0)
        total = total if norm.bias is None else total + norm.bias
        torch.testing.assert_close(total, cache[name], **EXACT)
    final = cache.accumulated_resid(apply_ln=True)[-1]
    final = final if vit.ln_final.bias is None else final + vit.ln_final.bias
    torch.testing.assert_close(final, cache["hook_ln_final"], **EXACT)


def test_the_scale_is_frozen_at_the_cached_one(vit, image):
    _, cache = vit.run_with_cache(image)
    stack = cache.decompose_resid()
    torch.testing.assert_close(cache.apply_ln_to_stack(3 * stack), 3 * cache.apply_ln_to_stack(stack), **EXACT)


def test_tokens_alone_are_enough_where_the_model_reads_one(vit, image):
    logits, cache = vit.run_with_cache(image)
    _, cut = vit.run_with_cache(image, pos="cls")
    whole = cache.logit_attrs(cache.decompose_resid(), 4)
    torch.testing.assert_close(cut.logit_attrs(cut.decompose_resid(), "gnu"), whole, **EXACT)
    stack = cache.stack_head_results(pos_slice="cls", incl_remainder=True)
    assert stack.shape == (9, 3, 1, 18)
    attrs = cache.logit_attrs(stack, 4, pos_slice="cls")
    torch.testing.assert_close(attrs.sum(0) + cache.logit_constant(4), logits[:, 4], **EXACT)
    assert torch.equal(cache.decompose_resid(pos_slice=[0, 2]), cache.decompose_resid()[:, :, [0, 2]])
    with pytest.raises(InputError, match="same pos_slice"):
        cache.logit_attrs(stack, 4)
    with pytest.raises(InputError, match="same pos_slice"):
        cache.logit_attrs(cache.decompose_resid(pos_slice=2), 4, pos_slice=2)
    _, other = vit.run_with_cache(image, pos=slice(1, 3))
    with pytest.raises(InputError, match="pools 1 of 9 tokens"):
        other.logit_attrs(other.decompose_resid(), 4)


def test_each_token_has_its_share_of_a_mean(make, image):
    logits, cache = make(pool="avg", registers=2).run_with_cache(image)
    attrs = cache.logit_attrs(cache.decompose_resid(), 3, per_token=True)
    assert attrs.shape == (6, 3, 9)
    assert not attrs[..., :3].any()
    assert attrs[..., 3:].all()
    torch.testing.assert_close(attrs.sum((0, 2)) + cache.logit_constant(3), logits[:, 3], **EXACT)


def test_a_larger_image_pools_its_own_patches(make):
    image = torch.randn(1, 3, 16, 24)
    logits, cache = make(pool="avg", interpolation=True).run_with_cache(image)
    total = cache.logit_attrs(cache.decompose_resid(), 3).sum(0) + cache.logit_constant(3)
    torch.testing.assert_close(total, logits[:, 3], **EXACT)


def test_without_a_batch_axis(variant, image):
    logits, cache = variant.run_with_cache(image[:1], remove_batch_dim=True)
    total = cache.logit_attrs(cache.decompose_resid(), 3).sum(0) + cache.logit_constant(3)
    torch.testing.assert_close(total, logits[0, ..., 3], **EXACT)


def test_post_norm_blocks_refuse_heads_and_neurons(make, image):
    _, cache = make(kind="res_post").run_with_cache(image)
    with pytest.raises(NotApplicable, match="ln1 normalises the sum of its heads"):
        cache.stack_head_results()
    with pytest.raises(NotApplicable, match="ln2 normalises the sum of its neurons"):
        cache.stack_neuron_results()


def test_refusals_say_why(make, vit, image):
    _, cache = make(pool="attention").run_with_cache(image, names=lambda name: "pool" not in name)
    torch.testing.assert_close(cache.decompose_resid().sum(0), cache["resid_post", -1], **EXACT)
    with pytest.raises(UnknownName, match=r"lacks pool\.attn\.hook_pattern"):
        cache.logit_attrs(cache.decompose_resid(), 0)
    output, cache = make(n_classes=None).run_with_cache(image)
    stack = cache.decompose_resid()
    with pytest.raises(NotApplicable, match="no head, so there are no logits"):
        cache.logit_attrs(stack, 0)
    torch.testing.assert_close(cache.project_stack(stack).sum(0) + cache.logit_constant(), output, **EXACT)
    with pytest.raises(InputError, match=r"Expected a direction \[18\]"):
        cache.logit_attrs(stack, torch.randn(3, 17))
    _, cache = vit.run_with_cache(image)
    for classes, words in ((7, "0 to 6"), ("cta", "Did you mean cat"), (-1, "No class -1")):
        with pytest.raises(UnknownName, match=words):
            cache.logit_attrs(cache.decompose_resid(), classes)
    with pytest.raises(InputError, match="one for each of the 3 images; got 2"):
        cache.logit_attrs(cache.decompose_resid(), [1, 2])
    with pytest.raises(InputError, match="Expected a stack"):
        cache.logit_attrs(cache.decompose_resid()[..., :4], 1)
    cache.model = None
    with pytest.raises(NotApplicable, match="no model"):
        cache.decompose_resid()


def test_a_cache_that_lacks_something_says_what_to_cache(vit, image):
    _, cache = vit.run_with_cache(image, names="resid_post")
    asked: set[str] = set()
    for _ in range(3):
        try:
            total = cache.logit_attrs(cache.decompose_resid(), 1).sum(0) + cache.logit_constant(1)
            break
        except UnknownName as error:
            asked |= set(ast.literal_eval(str(error).split("names=")[1].rstrip(".")))
            _, cache = vit.run_with_cache(image, names=asked)
    torch.testing.assert_close(total, vit(image)[:, 1], **EXACT)
    _, cache = vit.run_with_cache(image, names="z", heads=0)
    with pytest.raises(NotApplicable, match="holds 1 of 4 heads"):
        cache.stack_head_results()


def test_a_cache_elsewhere_and_of_another_dtype(vit, image):
    logits, cache = vit.float().run_with_cache(image.float(), dtype=torch.float64)
    total = cache.logit_attrs(cache.stack_head_results(incl_remainder=True), 1).sum(0) + cache.logit_constant(1)
    torch.testing.assert_close(total.float(), logits[:, 1], rtol=1e-5, atol=1e-4)
