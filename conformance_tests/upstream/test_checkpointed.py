"""Activation checkpointing inside hooked upstreams: numbers and gradients are those without it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from derivatives import assert_same, curved, gradients
from torch.utils.checkpoint import checkpoint
from windows import Adapter

from prisma_core import HookError
from prisma_core.zoo import adapt_with

pytestmark = pytest.mark.usefixtures("in_float64")
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["no reentry", "reentry"])


class Saving(torch.nn.Module):
    """Blocks that are checkpointed, as libraries do it."""

    def __init__(self, block, reentrant):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def blocks_saving(model, reentrant):
    upstream = model.upstream
    upstream.blocks = torch.nn.ModuleList(Saving(block, reentrant) for block in upstream.blocks)
    return model


@REENTRANT
def test_every_point(model, upstream, x, reentrant):
    saving = blocks_saving(adapt_with(Adapter(), upstream), reentrant)
    for name in model.hook_points():
        assert_same(gradients(model, x, [name]), gradients(saving, x, [name]))
    assert_same(gradients(model, x, ["*.hook_z"], "*"), gradients(saving, x, ["*.hook_z"], "*"))
    assert not torch.allclose(gradients(model, x, ["*.hook_z"])[0], gradients(model, x, ["*.hook_q"])[0])


def test_gradients_in_a_cache(model, upstream, x):
    saving = blocks_saving(adapt_with(Adapter(), upstream), False)
    runs = [one.run_with_cache(x, hooks={"*.hook_z": curved}, loss=lambda y: y[0, 1]) for one in (model, saving)]
    assert_same(*(list(cache.grad.values()) for _, cache in runs))


@REENTRANT
def test_a_checkpoint_around_the_model(model, x, reentrant):
    names = ["*.hook_pattern", "*.hook_resid_mid"]
    run = model.forward
    expected = gradients(model, x, names)
    model.forward = partial(checkpoint, run, use_reentrant=reentrant)
    assert_same(expected, gradients(model, x, names))


def test_a_function_that_is_no_module_is_right_or_refused(model, upstream, x):
    saving = adapt_with(Adapter(), upstream)
    for block in saving.upstream.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert_same(gradients(model, x, ["*.hook_pattern"]), gradients(saving, x, ["*.hook_pattern"]))
    with pytest.raises(HookError, match="checkpoints a function that calls add"):
        gradients(saving, x, ["*.hook_resid_mid"])
