"""Passes inside hooks."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from prisma_core import HookError
from prisma_core.hooks.point import OPEN_SCOPES

# -------------------------------------------------------------------- passes inside hooks


def test_a_hook_may_run_its_own_model(vit, image, other):
    """Patching with the source looked up inside the hook: the inner pass has no hooks, so there is no recursion."""

    def from_other(z, at):
        return vit.run_with_cache(other, names=at.name)[1][at.name]

    patched = vit.run_with_hooks(image, hooks={("z", 0): from_other})
    source = vit.run_with_cache(other, names=("z", 0))[1]["z", 0]
    assert torch.equal(patched, vit.run_with_hooks(image, hooks={("z", 0): lambda z, at: source}))
    assert not torch.equal(patched, vit(image))


@pytest.mark.parametrize("output", [True, False])
def test_a_cache_holds_its_own_pass_and_not_the_one_inside_a_hook(vit, image, other, output):
    inner = []
    hooks = {("resid_post", 0): lambda r, at: inner.append(vit(other))}
    names = ["embed", ("resid_post", 1)]
    _, cache = vit.run_with_cache(image, names=names, hooks=hooks, output=output)
    _, plain = vit.run_with_cache(image, names=names)
    assert list(cache) == list(plain)
    assert all(torch.equal(cache[name], plain[name]) for name in plain)
    assert torch.equal(inner[0], vit(other))
    with vit.caching(names) as outer, vit.hooks(hooks):
        vit(image)
    assert all(torch.equal(outer[name], plain[name]) for name in plain)


def test_a_scope_opened_inside_a_hook_is_of_the_inner_pass_and_may_stay_open(vit, image, other):
    stack = ExitStack()
    seen = []

    def hook(x, at):
        with vit.hooks({("resid_post", 1): lambda x, at: x * 0}):
            seen.append(vit(other))
        stack.enter_context(vit.hooks({("resid_post", 1): lambda x, at: x * 2}))

    output = vit.run_with_hooks(image, hooks={("resid_post", 0): hook})
    assert torch.equal(seen[0], vit.run_with_hooks(other, hooks={("resid_post", 1): lambda x, at: x * 0}))
    doubled = vit(image)
    assert torch.equal(output, doubled)
    stack.close()
    assert not torch.equal(output, vit(image))
    assert OPEN_SCOPES.get() == ()


def test_a_scope_left_inside_a_hook_is_off_for_the_rest_of_the_pass(vit, image):
    outer = vit.hooks({("resid_post", 1): lambda x, at: x * 0})
    with outer:
        output = vit.run_with_hooks(
            image, hooks={("resid_post", 0): lambda x, at: outer.__exit__(ValueError, None, None)}
        )
    assert torch.equal(output, vit(image))


def test_scopes_of_other_models_stay_on_inside_a_hook(vit, make, image):
    """A coder that is spliced in may be hooked and cached itself."""
    coder = make(seed=7)
    plain, double = coder(image), coder.run_with_hooks(image, hooks={"embed": lambda x, at: 2 * x})
    seen = []
    with (
        coder.caching("embed") as cache,
        coder.hooks({"embed": lambda x, at: 2 * x}),
        vit.hooks({("z", 0): lambda z, at: seen.append(coder(image))}),
    ):
        vit(image)
    assert torch.equal(seen[0], double)
    assert not torch.equal(plain, double)
    assert torch.equal(cache["embed"], 2 * coder.run_with_cache(image, names="embed")[1]["embed"])


def test_a_backward_hook_may_run_its_own_model(vit, image, other):
    seen = []
    leaf = image.clone().requires_grad_()
    with vit.hooks(backward={("z", 0): lambda g, at: seen.append(vit(other))}):
        vit(leaf).sum().backward()
        assert len(seen) == 1
    assert torch.equal(seen[0], vit(other))


def test_a_loss_may_run_the_model(vit, image, other):
    _, cache = vit.run_with_cache(image, loss=lambda logits: (logits - vit(other)).square().sum())
    target = vit(other).detach()
    _, plain = vit.run_with_cache(image, loss=lambda logits: (logits - target).square().sum())
    assert all(torch.equal(cache[name], plain[name]) for name in plain)
    for name in plain.grad:
        torch.testing.assert_close(cache.grad[name], plain.grad[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("output", [True, False])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_cache_holds_no_pass_inside_a_hook_of_torchs(vit, image, other, kind, output):
    """Torch's hooks pause no scopes: what such a pass goes by would be taken for the pass that is cached."""
    began = []

    def inner(*args):
        if not began:
            began.append(1)
            vit(other)

    handle = getattr(vit.blocks[0], kind)(inner)
    with pytest.raises(HookError, match=r"fired twice|began inside"):
        vit.run_with_cache(image, names=("resid_post", 1), output=output)
    handle.remove()
    assert OPEN_SCOPES.get() == ()
    vit.run_with_cache(image, names=("resid_post", 1), output=output)
