"""Backward hooks read and replace gradients."""

from __future__ import annotations

import pytest
import torch
from models import close

from prisma_core import HookError


def treble(x, at):
    x.mul_(3)


def test_backward_hooks_read_gradients(vit, image):
    seen = {}

    def read(gradient, at):
        seen[at.name] = gradient.clone()

    leaf = image.clone().requires_grad_()
    with vit.hooks(backward={"resid_post": read, "pattern": read, "embed": read}):
        vit(leaf)[:, 2].sum().backward()
    _, cache = vit.run_with_cache(
        image, names=["resid_post", "pattern", "embed"], loss=lambda logits: logits[:, 2].sum()
    )
    assert set(seen) == set(cache.grad)
    for name, gradient in seen.items():
        close(gradient, cache.grad[name])


def test_backward_hooks_replace_gradients(vit, image):
    def grads(**how):
        leaf = image.clone().requires_grad_()
        with vit.hooks(**how):
            vit(leaf)[:, 2].sum().backward()
        return leaf.grad

    plain = grads()
    close(grads(backward={"embed": lambda g, at: 3 * g}), 3 * plain)
    close(grads(backward={"embed": treble}), 3 * plain)
    assert grads(backward={"embed": lambda g, at: 0 * g}).eq(0).all()
    frozen = grads(backward={"pattern": lambda g, at: 0 * g})
    held = {}
    with vit.hooks({"pattern": lambda x, at: x.detach()}):
        leaf = image.clone().requires_grad_()
        vit(leaf)[:, 2].sum().backward()
        held = leaf.grad
    close(frozen, held)
    assert not torch.equal(frozen, plain)


def test_backward_hooks_of_a_frozen_model(vit, image):
    """Neither the input nor the weights need gradients: the place itself starts the graph."""
    vit.requires_grad_(False)
    seen = {}
    with vit.hooks(backward={("resid_post", 0): lambda g, at: seen.update({at.name: g})}):
        vit(image)[:, 2].sum().backward()
    _, cache = vit.run_with_cache(image, names=("resid_post", 0), loss=lambda logits: logits[:, 2].sum())
    close(seen["blocks.0.hook_resid_post"], cache.grad["resid_post", 0])


def test_backward_hooks_come_after_edits_and_before_captures(vit, image):
    order = []
    with vit.hooks(
        {("resid_mid", 0): lambda x, at: order.append("edit") or 2 * x},
        backward={("resid_mid", 0): lambda g, at: order.append("gradient")},
    ):
        _, cache = vit.run_with_cache(image, names=("resid_mid", 0), detach=False)
    cache["resid_mid", 0].square().sum().backward(retain_graph=True)
    assert order == ["edit", "gradient"]
    close(cache["resid_mid", 0], 2 * vit.run_with_cache(image, names=("resid_mid", 0))[1]["resid_mid", 0])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda g: g[:1], "expected the gradient's"),
        (lambda g: g.float(), "torch.float32"),
        (lambda g: 1, "returned int"),
    ],
)
def test_unusable_gradients_are_errors(vit, image, value, words):
    with vit.hooks(backward={("resid_mid", 1): lambda g, at: value(g)}), pytest.raises(HookError, match=words):
        vit(image).sum().backward()


def test_backward_hooks_without_gradients_would_never_run(vit, image):
    with (
        torch.no_grad(),
        vit.hooks(backward={("z", 0): lambda g, at: None}),
        pytest.raises(HookError, match=r"gradients are off"),
    ):
        vit(image)


def test_run_with_hooks_takes_backward_hooks(vit, image):
    seen = []
    logits = vit.run_with_hooks(image, backward={"z": lambda g, at: seen.append(at.name)})
    logits.sum().backward()
    assert sorted(seen) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
