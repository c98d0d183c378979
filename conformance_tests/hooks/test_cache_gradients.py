"""Gradients of a loss in a cache."""

from __future__ import annotations

import copy

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


# -------------------------------------------------------------------- what a cache with a graph holds stays


def _edits_result(module, args, result):
    result.mul_(2)


def _edits_argument(module, args, result):
    args[0].mul_(2)


@pytest.mark.parametrize("edit", [_edits_result, _edits_argument])
@pytest.mark.parametrize("with_loss", [False, True])
def test_hooks_of_torch_s_that_edit_in_place_leave_a_cache_with_a_graph(vit, image, edit, with_loss):
    handle = vit.blocks[0].register_forward_hook(edit)
    try:
        logits, plain = vit.run_with_cache(image)
        how = {"loss": loss_of} if with_loss else {"detach": False}
        again, cache = vit.run_with_cache(image, **how)
    finally:
        handle.remove()
    torch.testing.assert_close(again, logits)
    assert all(torch.equal(cache[name], plain[name]) for name in plain)
    if not with_loss:  # what is cached is what the output was computed of
        (grad,) = torch.autograd.grad(loss_of(again), [cache["resid_post", 0]])
        assert grad.any()


@pytest.mark.parametrize("detach", [True, False])
def test_a_deep_copy_of_a_cache_shares_the_model(vit, image, detach):
    _, cache = vit.run_with_cache(image, detach=detach)
    copied = copy.deepcopy(cache)
    assert copied.model is vit
    assert all(torch.equal(copied[name], cache[name]) for name in cache)
    with torch.no_grad():
        copied["resid_post", 1].zero_()
    assert cache["resid_post", 1].any()
    if not detach:
        assert torch.autograd.grad(copied["resid_post", 0].sum(), [vit.embed.proj.weight])[0].any()


def test_a_deep_copy_of_a_cache_has_its_gradients(vit, image):
    _, cache = vit.run_with_cache(image, loss=loss_of)
    assert all(torch.equal(value, cache.grad[name]) for name, value in copy.deepcopy(cache).grad.items())
