"""Activation checkpointing: hooks, caches and gradients are those of the same pass without it."""

from __future__ import annotations

import itertools
import threading
from functools import partial

import pytest
import torch
from models import EXACT, build
from torch.utils.checkpoint import checkpoint

from prisma_core import HookError
from prisma_core.hooks.point import Scope

EDITS = {("pattern", 1): lambda x, at: x.tanh(), ("resid_post", 0): lambda x, at: 3 * x}
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["no reentry", "reentry"])


def gradient(run, image):
    x = image.detach().clone().requires_grad_()
    run(x).square().sum().backward()
    return x.grad


def in_a_scope(model, run, x):
    with model.hooks(EDITS):
        return run(x)


def checkpointed(reentrant, each, run):
    """Checkpoint each of these modules' forward while ``run`` runs."""
    for module in each:
        module.forward = partial(run, module.forward, reentrant)
    return each


def saving(forward, reentrant, *args, **kwargs):
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)


@pytest.fixture
def plain(in_float64):
    return build(scale=True, registers=2)


@REENTRANT
@pytest.mark.parametrize("around", ["the model", "more than the model", "each block", "the model and each block"])
def test_gradients_with_hooks(plain, image, reentrant, around):
    model = build(scale=True, registers=2)
    if around.endswith("each block"):
        checkpointed(reentrant, model.blocks, saving)
    run = (lambda x: model(2 * x).tanh()) if around.startswith("more") else model
    whole = (lambda x: plain(2 * x).tanh()) if around.startswith("more") else plain
    if around != "each block":
        run = partial(checkpoint, run, use_reentrant=reentrant)
    expected = gradient(partial(in_a_scope, plain, whole), image)
    assert torch.equal(gradient(partial(in_a_scope, model, run), image), expected)
    assert not torch.allclose(gradient(run, image), expected)


def test_a_twin_that_forgets_the_scopes_is_seen(plain, image, monkeypatch):
    expected = gradient(partial(in_a_scope, plain, plain), image)
    monkeypatch.setattr("prisma_core.hooks.point.keep", lambda *args: None)
    run = partial(checkpoint, plain, use_reentrant=True)
    assert not torch.allclose(gradient(partial(in_a_scope, plain, run), image), expected)


@REENTRANT
def test_scopes_opened_inside_are_not_opened_twice(plain, image, reentrant):
    def run(x):
        return plain.run_with_cache(x, names="z", hooks=EDITS)[0]

    expected = gradient(run, image)
    assert torch.equal(gradient(lambda x: checkpoint(run, x, use_reentrant=reentrant), image), expected)
    outer = {("mlp_out", 0): lambda x, at: x / 2}
    with plain.hooks(outer):
        both = gradient(run, image)
        assert torch.equal(gradient(lambda x: checkpoint(run, x, use_reentrant=reentrant), image), both)
    assert not torch.allclose(both, expected)


@REENTRANT
def test_a_cache_holds_the_first_computation(plain, image, reentrant):
    x = image.clone().requires_grad_()
    _, expected = plain.run_with_cache(image, hooks=EDITS)
    with plain.hooks(EDITS), plain.caching() as cache:
        checkpoint(plain, x, use_reentrant=reentrant).square().sum().backward()
    for name in expected:  # without a graph scales are read from the fused kernel
        torch.testing.assert_close(cache[name], expected[name], **EXACT)
    torch.testing.assert_close(x.grad, gradient(partial(in_a_scope, plain, plain), image), **EXACT)


def test_gradients_in_a_cache(plain, image):
    model = build(scale=True, registers=2)
    checkpointed(False, model.blocks, saving)
    _, expected = plain.run_with_cache(image, hooks=EDITS, loss=lambda logits: logits[0, 1])
    _, cache = model.run_with_cache(image, hooks=EDITS, loss=lambda logits: logits[0, 1])
    assert all(torch.equal(cache.grad[name], expected.grad[name]) for name in expected)
    grads = []
    with model.hooks(EDITS, backward={"blocks.0.attn.hook_z": lambda grad, at: grads.append(grad)}):
        output = model(image)
    output[0, 1].backward()
    assert len(grads) == 1
    torch.testing.assert_close(grads[0], expected.grad["z", 0], **EXACT)


def test_graphs_that_reentrant_checkpoints_do_not_make_are_refused(plain, image):
    checkpointed(True, plain.blocks, saving)
    with pytest.raises(HookError, match="use_reentrant=False"):
        plain.run_with_cache(image, loss=lambda logits: logits[0, 1])
    scope = plain.hooks(backward={"blocks.0.attn.hook_z": lambda grad, at: None})
    with scope, pytest.raises(HookError, match=r"blocks\.0\.attn\.hook_z.*use_reentrant=False"):
        plain(image)
    with plain.caching("z", detach=False), pytest.raises(HookError, match="use_reentrant=False"):
        plain(image.requires_grad_())


@REENTRANT
def test_a_pass_may_stop_inside(plain, image, reentrant):
    checkpointed(reentrant, plain.blocks, saving)
    x = image.clone().requires_grad_()
    _, expected = build(scale=True, registers=2).run_with_cache(x, names=("z", 0), output=False)
    _, cache = plain.run_with_cache(x, names=("z", 0), output=False)
    assert torch.equal(cache["z", 0], expected["z", 0])
    assert torch.equal(gradient(plain, image), gradient(build(scale=True, registers=2), image))


@REENTRANT
@pytest.mark.parametrize("names", [None, "result", "z"])
def test_gradients_taken_while_a_cache_is_open(plain, image, reentrant, names):
    """What is computed again goes by captures that are full."""
    expected = gradient(plain, image)
    with plain.caching(names) as cache:
        again = gradient(partial(checkpoint, plain, use_reentrant=reentrant), image)
    torch.testing.assert_close(again, expected, **EXACT)
    with torch.no_grad():
        first = plain.run_with_cache(image, names=names)[1]
    torch.testing.assert_close({name: cache[name].detach() for name in first}, dict(first), **EXACT)


@REENTRANT
@pytest.mark.parametrize("names", [None, ["scale", "pattern"], "z"])
def test_gradients_in_a_cache_that_was_opened_without(plain, image, reentrant, names):
    expected = gradient(plain, image)
    with torch.no_grad(), plain.caching(names) as cache, torch.enable_grad():
        again = gradient(partial(checkpoint, plain, use_reentrant=reentrant), image)
    torch.testing.assert_close(again, expected, **EXACT)
    torch.testing.assert_close(dict(cache), dict(plain.run_with_cache(image, names=names)[1]), **EXACT)


@REENTRANT
def test_a_scope_opened_only_for_the_second_computation_is_refused(plain, image, reentrant):
    output = checkpoint(plain, image.requires_grad_(), use_reentrant=reentrant)
    with plain.hooks(EDITS), pytest.raises(HookError, match="runs again for gradients"):
        output.sum().backward()


def test_other_passes_in_between_change_nothing(plain, image):
    expected = gradient(partial(in_a_scope, plain, plain), image)
    x = image.clone().requires_grad_()
    with plain.hooks(EDITS):
        first = checkpoint(plain, x, use_reentrant=False)
    with plain.hooks({"resid_mid": lambda x, at: x * 0}):
        second = checkpoint(plain, image.clone().requires_grad_(), use_reentrant=False)
    second.sum().backward()
    first.square().sum().backward()
    assert torch.equal(x.grad, expected)


@REENTRANT
def test_every_pair_of_a_hook_and_a_read(plain, image, reentrant):
    names = ["blocks.0.attn.hook_q", "blocks.0.ln2.hook_scale", "blocks.1.attn.hook_pattern", "blocks.1.hook_q_input"]
    for edited, read in itertools.product(names, names):
        grads = []
        for run in (plain, partial(checkpoint, plain, use_reentrant=reentrant)):
            with plain.hooks({edited: lambda x, at: x * 1.5}), plain.caching(read):
                grads.append(gradient(run, image))
        torch.testing.assert_close(*grads, **EXACT)


@REENTRANT
def test_gradients_taken_in_another_thread(plain, image, reentrant):
    """As autograd's own threads do on a GPU: they know no scope."""
    x = image.clone().requires_grad_()
    with plain.hooks(EDITS):
        output = checkpoint(plain, x, use_reentrant=reentrant)
        thread = threading.Thread(target=lambda: output.square().sum().backward())
        thread.start()
        thread.join()
    assert torch.equal(x.grad, gradient(partial(in_a_scope, plain, plain), image))


def test_nothing_stays_on(plain, image):
    with plain.hooks(EDITS):
        output = checkpoint(plain, image.requires_grad_(), use_reentrant=False)
    output.sum().backward()
    assert plain.open_hooks() == {}
    assert Scope(frozenset()).began == ()


@REENTRANT
def test_rows_of_patterns_alone(plain, image, reentrant):
    model = build(scale=True, registers=2)
    checkpointed(reentrant, model.blocks, saving)

    def run(model, x):
        with model.caching(["pattern", "attn_scores"], pos="cls"):
            return model(x)

    torch.testing.assert_close(gradient(partial(run, model), image), gradient(partial(run, plain), image), **EXACT)


@pytest.fixture
def compiling():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def by_itself(model):
    model.compile(backend="aot_eager", fullgraph=True)
    return model


@REENTRANT
@pytest.mark.usefixtures("compiling")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [whole, by_itself])
def test_a_compiled_model(image, reentrant, compiled, in_float64):
    plain, model = (build(layers=1, scale=True) for _ in range(2))
    edits = {("pattern", 0): lambda x, at: x.tanh()}
    run = partial(checkpoint, compiled(model), use_reentrant=reentrant)

    def scoped(model, run, x):
        with model.hooks(edits):
            return run(x)

    expected = gradient(partial(scoped, plain, plain), image)
    torch.testing.assert_close(gradient(partial(scoped, model, run), image), expected, **EXACT)
    torch.testing.assert_close(gradient(run, image), gradient(plain, image), **EXACT)
    output = run(image.clone().requires_grad_())
    with model.hooks(edits), pytest.raises(HookError, match="runs again for gradients"):
        output.sum().backward()


@pytest.mark.usefixtures("compiling")
@pytest.mark.filterwarnings("ignore")
def test_a_cache_around_a_compiled_part_says_why_it_cannot_be(image, in_float64):
    model = build(scale=True, registers=2)
    module = model.get_submodule("blocks.1.mlp")
    module.forward = torch.compile(module.forward, backend="aot_eager")
    checkpointed(False, [module], saving)
    with pytest.raises(HookError, match=r"fired twice.*compiled in a checkpoint"), model.caching("post"):
        model(image.requires_grad_()).sum().backward()
    assert model.open_hooks() == {}


@REENTRANT
@pytest.mark.usefixtures("compiling")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["blocks.1", "blocks.1.attn", "blocks.1.mlp"])
def test_a_compiled_part(plain, image, reentrant, part):
    """The pass around it is eager, so nothing but the compiled code itself runs inside the checkpoint."""
    model = build(scale=True, registers=2)
    module = model.get_submodule(part)
    module.forward = torch.compile(module.forward, backend="aot_eager")
    checkpointed(reentrant, [module], saving)
    edits = {
        ("resid_mid", 1): lambda x, at: x.tanh(),
        ("z", 1): lambda x, at: x.tanh(),
        ("post", 1): lambda x, at: 2 * x,
    }

    def scoped(model, x):
        with model.hooks(edits):
            return model(x)

    expected = gradient(partial(scoped, plain), image)
    torch.testing.assert_close(gradient(partial(scoped, model), image), expected, **EXACT)
    assert not torch.allclose(gradient(model, image), expected)
