"""The life of a scope: what it leaves behind, what its passes do not reach, and submodules replaced meanwhile."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

from prisma_core import HookError, HookPoint, UnknownName
from prisma_core.hooks.point import OPEN_SCOPES


def zero(x, at):
    x.zero_()


def test_nothing_is_left_after_a_scope_or_an_exception(vit, image):
    logits = vit(image)
    state = {name: tensor.clone() for name, tensor in vit.state_dict().items()}

    def broken(x, at):
        x.zero_()
        raise RuntimeError("from the hook")

    for run in (
        lambda: vit.run_with_hooks(image, hooks={"z": broken}),
        lambda: vit.run_with_cache(image, hooks={"z": broken}),
        lambda: vit.run_with_cache(image, loss=lambda logits: 1 / 0),
    ):
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            run()
        assert OPEN_SCOPES.get() == ()
        assert torch.equal(vit(image), logits)
    with vit.hooks({"z": lambda x, at: 0 * x}):
        assert not torch.equal(vit(image), logits)
    with vit.caching("z", pos=0), vit.caching("q"):
        vit(image)
    vit.run_with_cache(image, names="embed", output=False)
    assert OPEN_SCOPES.get() == ()
    assert torch.equal(vit(image), logits)
    assert all(torch.equal(tensor, state[name]) for name, tensor in vit.state_dict().items())
    for module in vit.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks


def test_a_scope_opens_when_entered_not_when_made(vit, image):
    logits = vit(image)
    scope = vit.hooks({"z": lambda x, at: 0 * x})
    assert torch.equal(vit(image), logits)
    with scope:
        assert not torch.equal(vit(image), logits)


def test_a_scope_is_of_one_model(vit, make, image):
    other = make(seed=9)
    logits = other(image)
    with vit.hooks({"z": lambda x, at: 0 * x}):
        assert torch.equal(other(image), logits)


def test_two_threads_have_their_own_hooks(vit, image):
    """Both are inside their scope at once, and each sees its own hook alone."""
    wanted = [vit.run_with_hooks(image, hooks={("z", 0): lambda x, at, f=factor: f * x}) for factor in (0.0, 2.0)]
    barrier = threading.Barrier(2, timeout=60)
    outputs: list[torch.Tensor | None] = [None, None]
    caches: list[int | None] = [None, None]

    def work(index: int, factor: float) -> None:
        def hook(x, at):
            barrier.wait()
            return factor * x

        with vit.hooks({("z", 0): hook}), vit.caching("z" if index else "q") as cache:
            barrier.wait()
            outputs[index] = vit(image)
            barrier.wait()
        caches[index] = sorted(cache)

    threads = [threading.Thread(target=work, args=(index, factor)) for index, factor in enumerate((0.0, 2.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(outputs[0], wanted[0])
    assert torch.equal(outputs[1], wanted[1])
    assert caches == [[f"blocks.{layer}.attn.hook_{name}" for layer in range(2)] for name in "qz"]
    assert torch.equal(vit(image), vit(image))


def test_a_hook_that_is_never_reached_is_an_error(vit, image):
    with pytest.raises(HookError, match=r"blocks\.1\.attn\.hook_z was not reached"):
        vit.run_with_hooks(image, hooks={"z": lambda x, at: x}, stop_at_layer=1)


def test_a_scope_tells_of_hook_points_that_its_passes_did_not_go_by(vit, make, image):
    keep = {"z": lambda x, at: None}
    stream = vit(image, stop_at_layer=1)
    with pytest.raises(HookError, match=r"blocks\.1\.attn\.hook_z was not reached"), vit.hooks(keep):
        vit(image, stop_at_layer=1)
    with pytest.raises(HookError, match=r"blocks\.1\.attn\.hook_z was not reached"), vit.caching("z"):
        vit(image, stop_at_layer=1)
    with pytest.raises(HookError, match=r"hook_embed was not reached"), vit.hooks(backward={"embed": keep["z"]}):
        vit(stream, start_at_layer=1)
    with vit.hooks(keep):  # one pass of several is enough
        vit(image, stop_at_layer=1)
        vit(image)
    with vit.caching() as cache:  # nothing was asked for by name
        vit(image, stop_at_layer=1)
    assert "blocks.1.attn.hook_z" not in cache
    with vit.hooks(keep), vit.caching("q"):  # no pass at all, or of another model
        make(seed=3)(image)
    with vit.hooks({("z", 1): keep["z"]}), vit.caching(("z", 1)):  # a pass that is cut short knows no end
        vit.run_with_cache(image, names=("z", 0), output=False)
    assert OPEN_SCOPES.get() == ()


def test_an_error_of_the_pass_is_not_hidden_by_what_it_did_not_reach(vit, image):
    def work():
        with vit.hooks({"z": lambda x, at: None}):
            vit(image, stop_at_layer=1)
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        work()


def test_a_replaced_submodule_has_its_hooks_run(vit, image):
    """Hook points are those of the modules of now, however often they were asked for before."""
    named = list(vit.hook_points())
    vit.blocks[1].attn = copy.deepcopy(vit.blocks[1].attn)
    assert set(vit.hook_points()) == set(named)
    plain = vit(image)
    with vit.hooks({("z", 1): lambda x, at: 0 * x}):
        assert not torch.equal(vit(image), plain)
    vit.blocks[0] = copy.deepcopy(vit.blocks[1])
    with vit.caching("resid_post") as cache:
        vit(image)
    assert len(cache) == 2
    vit.blocks.append(copy.deepcopy(vit.blocks[1]))
    _, cache = vit.run_with_cache(image, names=("z", 2))
    assert list(cache) == ["blocks.2.attn.hook_z"]
    del vit.blocks[2]
    with pytest.raises(UnknownName):
        vit.resolve("blocks.2.attn.hook_z")
    plain = vit(image)
    vit.blocks[0].attn.hook_z = HookPoint("batch pos head d_head", "z")
    with vit.hooks({("z", 0): lambda x, at: 0 * x}):
        assert not torch.equal(vit(image), plain)
    vit.blocks[0].hook_mine = HookPoint("batch", "nothing")
    assert "blocks.0.hook_mine" in vit.hook_points()
    with pytest.raises(HookError, match=r"blocks\.0\.hook_mine was not reached"), vit.hooks({"mine": zero}):
        vit(image)


def test_a_submodule_replaced_within_a_scope_is_told(vit, image):
    def work():
        with vit.hooks({("z", 1): zero}):
            vit.blocks[1] = copy.deepcopy(vit.blocks[1])
            vit(image)

    with pytest.raises(HookError, match=r"blocks\.1\.attn\.hook_z was not reached"):
        work()


def test_a_model_nobody_holds_is_gone_at_once(make):
    """What is remembered about hook points does not hold the model: its memory is free without a garbage collector."""
    model = make()
    model.hook_points()
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
