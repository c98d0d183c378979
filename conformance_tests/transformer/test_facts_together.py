"""Facts of a spec that meet: biases of attention at other sizes, blocks without an MLP, norms of patches alone."""

from __future__ import annotations

import pytest
import torch
from models import EXACT
from pydantic import ValidationError

from prisma_core import HookedViT, InputError, ModelSpec, SpecError
from prisma_core.spec import Interpolation, NormSpec, RopeSpec, TextSpec
from prisma_core.transformer import HookedText

LN = NormSpec(eps=1e-3)


def drawn(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("suffix", [False, True])
def test_biases_of_a_shorter_text_are_those_of_its_tokens(in_float64, suffix):
    text = drawn(HookedText(TextSpec.plain(bias=True, suffix=suffix, pool="none")))
    tokens = text.sample_inputs(3)[0]
    whole, short = (text.run_with_cache(each)[1]["resid_post", 1] for each in (tokens, tokens[:, :5]))
    torch.testing.assert_close(short[:, :5], whole[:, :5], **EXACT)  # causal: what follows is not read
    with torch.no_grad():
        text.blocks[0].attn.attn_bias[:, 4, 0] += 1
    changed = text.run_with_cache(tokens[:, :5])[1]["resid_post", 1]
    assert (changed - short)[:, 4].abs().max() > 1e-3
    with pytest.raises(InputError, match=f"at most {8 + suffix} tokens"):
        text.blocks[0](torch.randn(1, 12, 12))


def test_biases_of_another_image_size_are_refused(in_float64, image):
    vit = drawn(HookedViT(ModelSpec.plain(bias=True, interpolation=Interpolation())))
    assert vit(image).shape == (3, 10)
    assert vit.sizes() == [(8, 12)]
    assert vit.fixed_layout == vit.layout
    with pytest.raises(InputError, match=r"one size"):
        vit(torch.randn(1, 3, 12, 12))
    for tokens in (5, 21):
        with pytest.raises(InputError, match=f"7 tokens, got {tokens}.*attn_bias"):
            vit(torch.randn(1, tokens, 12), start_at_layer=1)


@pytest.mark.parametrize("kind", ["pre", "res_post", "parallel"])
def test_blocks_of_any_kind_without_an_mlp(in_float64, image, kind):
    vit = drawn(HookedViT(ModelSpec.plain(kind=kind, mlp=None)))
    logits, cache = vit.run_with_cache(image)
    torch.testing.assert_close(cache["resid_post", 0], cache["resid_pre", 0] + cache["attn_out", 0], **EXACT)
    total = cache.project_stack(cache.decompose_resid()).sum(0) + cache.logit_constant()
    torch.testing.assert_close(total, logits, **EXACT)
    assert "blocks.0.hook_mlp_out" not in vit.hook_points()


def test_the_grid_is_that_of_the_image_and_its_patches():
    """Another one takes positions of other places, without a word."""
    with pytest.raises(SpecError, match=r"\(8, 12\) pixels has \(2, 3\) rows and columns .* layout says \(3, 2\)"):
        ModelSpec.plain(patch=4, image=(8, 12), rows=3, columns=2)
    plain = ModelSpec.plain(patch=4, image=(8, 12))
    for field, size, patch in (("image_size", (12, 12), (4, 4)), ("embed", (8, 12), (2, 4))):
        wrong = {"image_size": size, "embed": {**plain.embed.model_dump(), "patch": patch}}
        with pytest.raises(SpecError, match=r"and the layout says \(2, 3\)"):
            ModelSpec(**{**dict(plain), field: wrong[field]})


def test_rotary_tables_fit_every_head():
    per_head = RopeSpec(layout="half", per_head=True)
    ModelSpec.plain(heads=2, rope=per_head)
    ModelSpec.plain(heads=2, n_kv_heads=1, rope=RopeSpec(layout="half"))
    with pytest.raises(SpecError, match="per_head"):
        ModelSpec.plain(heads=2, n_kv_heads=1, rope=per_head)
    plain, wide = ModelSpec.plain(heads=2), ModelSpec.plain(heads=2, d_head=4)
    mixed = {**plain.model_dump(), "blocks": [plain.blocks[0].model_dump(), wide.blocks[0].model_dump()]}
    ModelSpec.model_validate(mixed)
    with pytest.raises(ValidationError, match="one width"):
        ModelSpec.model_validate({**mixed, "rope": {"layout": "half"}})


@pytest.mark.parametrize("final", [LN, None], ids=["ln_final", "none"])
@pytest.mark.parametrize("registers", [0, 2])
def test_a_norm_of_patches_alone_leaves_prefix_tokens_out(in_float64, image, final, registers):
    vit = drawn(HookedViT(ModelSpec.plain(pool="patches", registers=registers, ln_pool=LN, ln_final=final)))
    logits, cache = vit.run_with_cache(image)
    stack = cache.decompose_resid()
    assert stack.shape[2] == 7 + registers
    normed = cache.apply_ln_to_stack(stack)
    total = normed.sum(0) @ vit.W_U + cache.logit_constant()
    torch.testing.assert_close(total, logits, **EXACT)
    torch.testing.assert_close(cache.decompose_resid(apply_ln=True), normed, **EXACT)
    attrs = cache.logit_attrs(stack, 3).sum(0) + cache.logit_constant(3)
    torch.testing.assert_close(attrs, logits[..., 3], **EXACT)
    onto = cache.stack_neuron_results(2, apply_ln=True, project_output_onto=vit.W_U[:, 3])
    whole = cache.stack_neuron_results(2, apply_ln=True) @ vit.W_U[:, 3]
    torch.testing.assert_close(onto, whole, **EXACT)
    for other in (normed, stack[:, :, 2:]):
        with pytest.raises(InputError, match="Expected a stack"):
            cache.logit_attrs(other, 3)
