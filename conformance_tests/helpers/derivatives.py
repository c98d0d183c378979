"""Gradients of a hooked model in a scope, for tests that compare two ways to compute them."""

from __future__ import annotations

import torch


def curved(x, at):
    return x + x.tanh()


def gradients(model, x, names, read=None):
    """Return the gradients by the input and by every weight, with hooks at names and a cache of others."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with model.hooks(dict.fromkeys(names, curved)), model.caching(read or names):
        output = model(x)
    output.square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
