"""The canonical transformers as modules of torch: its hooks, its transforms; edits that do not depend on reading."""

from __future__ import annotations

import pytest
import torch
from models import EXACT

from prisma_core import InputError
from prisma_core.spec import TextSpec
from prisma_core.transformer import HookedText


def test_forward_hooks_of_torch_fire_on_every_module(variant, image):
    fired: list[str] = []
    modules = {name: each for name, each in variant.named_modules() if type(each) is not torch.nn.ModuleList}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, out, name=name: fired.append(name))
    variant(image)
    assert set(fired) == set(modules)


def test_a_forward_hook_on_the_embedding_edits_the_patches(vit, image):
    before = vit(image)
    handle = vit.embed.register_forward_hook(lambda module, args, out: out * 2)
    _, cache = vit.run_with_cache(image)
    handle.remove()
    assert torch.equal(cache["hook_embed"], 2 * vit.run_with_cache(image)[1]["hook_embed"])
    assert torch.equal(vit(image), before)
    pooled = []
    vit.pool.register_forward_hook(lambda module, args, out: pooled.append(out))
    assert torch.equal(vit.run_with_cache(image)[1]["hook_pooled"], pooled[0])


def test_forward_hooks_of_a_text_embedding(in_float64):
    text = HookedText(TextSpec.plain())
    tokens, rows = text.sample_inputs(2)[0], []
    text.embed.register_forward_hook(lambda module, args, out: rows.append(out))
    text(tokens)
    assert torch.equal(rows[0], text.W_E[tokens])


EDITS = {
    "scale": ("ln1.scale", lambda s, at: s * 3),
    "normalized": ("ln1.normalized", lambda n, at: n * 0.5 + 1),
    "both": ("ln1.*", lambda x, at: x * 2),
}


@pytest.mark.parametrize("facts", [{}, {"kv_heads": 2}, {"kind": "parallel"}, {"n_parallel": 2}], ids=str)
@pytest.mark.parametrize("edit", ["scale", "normalized"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_reading_the_inputs_of_heads_changes_no_edit_of_the_norm(make, image, facts, edit, grad):
    vit = make(**facts)
    points = [name for name in vit.hook_points() if ".ln1" in name and name.endswith(f"hook_{edit}")]
    hooks = {points[0]: EDITS[edit][1]}
    with torch.set_grad_enabled(grad):
        expected = vit.run_with_hooks(image, hooks=hooks)
        assert (expected - vit(image)).abs().max() > 1e-3
        for names in ("q_input", "k_input", "v_input", ["q_input", "k_input", "v_input", "ln1.*"]):
            names = [each for each in ([names] if isinstance(names, str) else names) if each != "ln1.*"]
            torch.testing.assert_close(vit.run_with_cache(image, names=names, hooks=hooks)[0], expected, **EXACT)


def test_gradients_by_the_norm_do_not_depend_on_what_is_read(vit, image):
    def grads(names):
        _, cache = vit.run_with_cache(image, names=names, loss=lambda logits: logits[:, 1].sum())
        return [cache.grad[name, 0] for name in ("ln1.scale", "ln1.normalized", "resid_pre")]

    read = ["ln1.scale", "ln1.normalized", "resid_pre"]
    for alone, beside in zip(grads(read), grads([*read, "q_input", "k_input", "v_input"]), strict=True):
        torch.testing.assert_close(alone, beside, **EXACT)


def test_an_edit_of_one_head_input_goes_through_the_norm(vit, image):
    def double(x, at):
        x[:, :, 2] *= 2
        x[:, :, 2, 0] += 1

    _, cache = vit.run_with_cache(image, names=["q", "k", "resid_pre"], hooks={("q_input", 0): double})
    stream = cache["resid_pre", 0] * 2
    stream[..., 0] += 1
    attn, ln1 = vit.blocks[0].attn, vit.blocks[0].ln1
    torch.testing.assert_close(cache["q", 0][:, :, 2], ln1.fused(stream) @ attn.W_Q[2] + attn.b_Q[2], **EXACT)
    clean = vit.run_with_cache(image, names=["q", "k"])[1]
    torch.testing.assert_close(cache["q", 0][:, :, 1], clean["q", 0][:, :, 1], **EXACT)
    assert torch.equal(cache["k", 0], clean["k", 0])


def test_vmap_and_grad_over_images(variant, image):
    def logit(x):
        return variant(x[None]).flatten()[1]

    given = image.clone().requires_grad_()
    expected = torch.stack([torch.autograd.grad(logit(x), given)[0][i] for i, x in enumerate(given)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(logit))(image), expected, **EXACT)
    torch.testing.assert_close(torch.vmap(lambda x: variant(x[None])[0])(image), variant(image), **EXACT)
    torch.testing.assert_close(torch.func.jacrev(logit)(image[0]), expected[0], **EXACT)


def test_forward_derivatives_by_every_activation(variant, image):
    """In forward mode no tensor says that derivatives are taken; kernels give some that are zero."""

    def activations(x):
        return tuple(variant.run_with_cache(x, detach=False)[1].values())

    tangent = torch.randn_like(image)
    _, forward = torch.func.jvp(activations, (image,), (tangent,))
    _, expected = torch.autograd.functional.jvp(activations, image, tangent)
    for each, other in zip(forward, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-9, atol=1e-9)


def test_vmap_over_texts(in_float64):
    text = HookedText(TextSpec.plain())
    tokens = text.sample_inputs(3)[0]
    torch.testing.assert_close(torch.vmap(lambda row: text(row[None])[0])(tokens), text(tokens), **EXACT)
    with pytest.raises(InputError, match="from 0 to 19"):
        text(tokens + 100)


def test_pixels_that_are_no_numbers_are_still_refused(vit, image):
    image[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="1 values that are NaN"):
        vit(image)
