"""Gradients of a loss in a cache."""

from __future__ import annotations

import pytest
import torch

from prisma_core import HookError


def loss_of(logits):
    return logits[..., 2].sum() - logits[..., 4].square().sum()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradients_equal_finite_differences(vit, image, frozen):
    vit.requires_grad_(not frozen)
    _, cache = vit.run_with_cache(image, loss=loss_of)
    assert set(cache.grad) == set(cache)
    generator = torch.Generator().manual_seed(5)
    of_layers = [("resid_mid", 0), ("pattern", 1), ("attn_scores", 0), ("ln2.scale", 0), ("mlp.post", 1)]
    for name in ("embed", *of_layers, "pooled"):
        direction = torch.randn(cache[name].shape, generator=generator, dtype=torch.float64)
        values = [
            loss_of(vit.run_with_hooks(image, hooks={name: lambda x, at, shift=step * direction: x + shift}))
            for step in (1e-6, -1e-6)
        ]
        wanted = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((cache.grad[name] * direction).sum(), wanted.detach(), rtol=1e-6, atol=1e-7)
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_gradients_equal_autograds(variant, image):
    _, cache = variant.run_with_cache(image, loss=loss_of)
    with variant.caching(detach=False) as graph:
        output = variant(image)
    found = torch.autograd.grad(loss_of(output), [graph[name] for name in cache], allow_unused=True)
    for name, grad in zip(cache, found, strict=True):
        if grad is not None and not name.endswith(("hook_q", "hook_k", "hook_v")):
            torch.testing.assert_close(cache.grad[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_are_sliced_and_cast_as_the_cache_is(vit, image):
    _, whole = vit.run_with_cache(image, loss=loss_of)
    _, cut = vit.run_with_cache(image, loss=loss_of, pos="patches", heads=1, dtype=torch.float32, names="z")
    assert torch.equal(cut.grad["z", 0], whole.grad["z", 0][:, 3:, 1:2].float())
    assert torch.equal(cut["z", 0], whole["z", 0][:, 3:, 1:2].float())
    assert cut.layout == vit.layout


def test_gradients_with_hooks_in_the_same_pass(vit, image):
    """Gradients are by the edited activation, which is what the cache holds."""
    edit = {("resid_post", 0): lambda x, at: 2 * x}
    logits, cache = vit.run_with_cache(image, loss=loss_of, hooks=edit)
    torch.testing.assert_close(logits, vit.run_with_hooks(image, hooks=edit), rtol=1e-11, atol=1e-11)
    resid = cache["resid_post", 0].requires_grad_()
    (wanted,) = torch.autograd.grad(loss_of(vit(resid, start_at_layer=1)), resid)
    torch.testing.assert_close(cache.grad["resid_post", 0], wanted, rtol=1e-10, atol=1e-12)


def test_a_loss_must_be_one_number_and_needs_the_output(vit, image):
    with pytest.raises(HookError, match=r"must be one number; got shape \[3, 7\]"):
        vit.run_with_cache(image, loss=lambda logits: logits)
    with pytest.raises(HookError, match="A loss needs the output"):
        vit.run_with_cache(image, loss=loss_of, output=False)
