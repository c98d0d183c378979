"""Techniques on models of any spec: exact sums, and sweeps, paths and rollouts as by hand.

A technique may refuse a model, with a reason: such cases are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from typing import Any, TypeVar

import torch
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from prisma_lens import attribute, head_outputs, logit_lens, neuron_outputs, rollout, second_order
from prisma_patch import activation_patch, knock_out, path_patch
from prisma_registers import without_registers
from torch import Tensor

from prisma_core import NotApplicable, Result
from prisma_core.plugin import widened

from .drawing import Drawn, close, models

BYS = st.sampled_from(["layer", "head", "neuron", "source", "head source"])
SINGLE = 1e-5  # patterns are mixed in float32
SWEPT = ("pos", "head", "query_pos", "key_pos")
HELD = ("hook_z", "hook_mlp_out")
REFUSING = settings(suppress_health_check=list(HealthCheck))
T = TypeVar("T")


def run(technique: Callable[..., T], *given: Any, **options: Any) -> T:
    """Return what a technique returns; the case is left out if the technique refuses the model."""
    try:
        return technique(*given, **options)
    except NotApplicable:
        reject()


def whole(terms: Result) -> Tensor:
    """Return the sum of the components with what is added beside them: ``[batch (pos) class]``."""
    over = [at for at, axis in enumerate(terms.axes) if axis not in ("batch", "pos", "class")]
    return terms.values.sum(over) + terms.tensors.get("rest", 0) + terms.tensors["constant"]


def changed(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return other inputs of the same shapes: examples in another order, images with other values."""
    return tuple(x.flip(0) * -0.7 if x.is_floating_point() else x.flip(0) for x in inputs)


@REFUSING
@given(models(["vision", "text"]), BYS)
@torch.no_grad()
def test_attribution_sums_to_the_output(drawn: Drawn, by: str) -> None:
    output = drawn.model(*drawn.inputs)
    every = torch.eye(output.shape[-1], dtype=output.dtype)
    if output.ndim == 3:
        token = run(attribute, drawn.model, drawn.inputs[0], every, by=by, pos=-1)
        assert token.axes[-2:] == ("batch", "class")
        assert close(whole(token), output[:, -1])
        assume("source" not in by)  # of one token alone
    assert close(whole(run(attribute, drawn.model, drawn.inputs[0], every, by=by)), output)


@given(models(["dual"]), BYS, st.sampled_from(["vision", "text"]))
@torch.no_grad()
def test_attribution_sums_to_the_logits_of_a_dual_encoder(drawn: Drawn, by: str, tower: str) -> None:
    output = drawn.model(*drawn.inputs)
    own, target = drawn.inputs if tower == "vision" else drawn.inputs[::-1]
    terms = run(attribute, drawn.model, own, target, by=by, tower=tower)
    assert close(whole(terms), output if tower == "vision" else output.T)


@given(models(["dual", "vision"]))
@torch.no_grad()
def test_head_outputs_sum_to_the_vector(drawn: Drawn) -> None:
    images = drawn.inputs[0]
    vectors = drawn.model.encode_image(images, normalize=True) if drawn.spec.kind == "dual" else drawn.model(images)
    last, vectors = ({"pos": -1}, vectors[:, -1]) if vectors.ndim == 3 else ({}, vectors)
    parts = run(head_outputs, drawn.model, images, **last)
    assert close(parts.values.sum((0, 1)) + parts.tensors["rest"], vectors)


@given(models(["vision", "text"]))
@torch.no_grad()
def test_the_lens_at_the_last_layer_is_the_output(drawn: Drawn) -> None:
    output, kind = drawn.model(*drawn.inputs), drawn.spec.pool.kind
    every = torch.eye(output.shape[-1], dtype=output.dtype)
    last = run(logit_lens, drawn.model, drawn.inputs[0], every).values[-1]
    if kind == "none":
        assert close(last, output)
    elif kind == "patches":
        assert close(last[:, drawn.spec.layout.n_prefix :], output)
    elif drawn.spec.kind == "text" and kind != "avg":
        assert all(any(close(token, one) for token in tokens) for tokens, one in zip(last, output, strict=True))
    elif kind == "token":
        assert close(last[:, 0], output)
    else:
        assume(last.shape[1] == 1 and kind != "token_and_avg")  # of several tokens each is read by itself
        assert close(last[:, 0], output)


@REFUSING
@given(models(["vision"]))
@torch.no_grad()
def test_second_order_effects_are_the_same_forwards_and_backwards(drawn: Drawn) -> None:
    output, (images,) = drawn.model(*drawn.inputs), drawn.inputs
    every, last = torch.eye(output.shape[-1], dtype=output.dtype), {"pos": -1} if output.ndim == 3 else {}
    for layer, effects in enumerate(run(second_order, drawn.model, images, every, **last).values):
        forwards = run(neuron_outputs, drawn.model, images, layer, range(len(effects)), **last).values
        assert close(effects, forwards)


@REFUSING
@given(models(["vision"]))
@torch.no_grad()
def test_a_model_without_registers_is_one_that_hides_them(drawn: Drawn) -> None:
    layout, pool = drawn.spec.layout, drawn.spec.pool
    assume(layout.registers and pool.kind != "none")  # all tokens would be fewer
    with knock_out(drawn.model, keys="registers"):
        hidden = drawn.model(*drawn.inputs)
    with ExitStack() as stack:
        bare = run(stack.enter_context, without_registers(drawn.model))
        assert close(bare(*drawn.inputs), hidden)


@given(models(), st.data())
@torch.no_grad()
def test_a_sweep_is_the_loop_by_hand(drawn: Drawn, data: st.DataObject) -> None:
    model, others, name = drawn.model, changed(drawn.inputs), drawn.names[0]
    axes = model.hook_points()[name].axes.split()
    assume(axes[0] == "batch")
    over = [axis for axis in axes if axis in SWEPT and data.draw(st.booleans())]
    size = data.draw(st.integers(1, 9))
    effects = run(activation_patch, model, drawn.inputs, others, lambda x: x, at=name, over=over, batch_size=size)
    _, theirs = model.run_with_cache(*others, names=name)
    clean = model(*drawn.inputs)
    for chosen in product(*(range(theirs[name].shape[axes.index(axis)]) for axis in over)):
        index: list[Any] = [slice(None)] * len(axes)
        for axis, at in zip(over, chosen, strict=True):
            index[axes.index(axis)] = at

        def put(x: Tensor, at: Any, place: tuple[Any, ...] = tuple(index)) -> None:
            x[place] = theirs[name][place]

        assert close(effects.values[chosen], model.run_with_hooks(*drawn.inputs, hooks={name: put}) - clean)


@given(models(["vision", "text"]), st.data())
@torch.no_grad()
def test_all_paths_are_a_patch_and_the_direct_one_holds_the_rest(drawn: Drawn, data: st.DataObject) -> None:
    model, inputs, others = drawn.model, drawn.inputs, changed(drawn.inputs)
    layer = data.draw(st.integers(0, drawn.spec.n_layers - 1))
    sender = [name for name in model.hook_points() if name.startswith(f"blocks.{layer}.") and name.endswith("hook_z")]
    held = [name for name in model.hook_points() if name.startswith("blocks.") and name.endswith(HELD)]
    clean, ours = model.run_with_cache(*inputs)
    _, theirs = model.run_with_cache(*others, names=sender)
    hooks = {name: (lambda x, at: theirs[at.name]) for name in sender}
    every = run(path_patch, model, inputs, others, lambda x: x, sender, through=lambda name: name.endswith(HELD))
    assert close(every.values, model.run_with_hooks(*inputs, hooks=hooks) - clean)
    direct = run(path_patch, model, inputs, others, lambda x: x, sender)
    hooks = {name: (lambda x, at: ours[at.name]) for name in held} | hooks
    assert close(direct.values, model.run_with_hooks(*inputs, hooks=hooks) - clean)


@given(models(["vision", "text"]))
@torch.no_grad()
def test_rollout_is_the_product_of_the_layers(drawn: Drawn) -> None:
    mixed = run(rollout, drawn.model, drawn.inputs[0])
    _, cache = drawn.model.run_with_cache(*drawn.inputs, names="pattern")
    product_of = torch.eye(mixed.values.shape[-1], dtype=mixed.values.dtype)
    for layer in range(drawn.spec.n_layers):
        pattern = torch.cat([x for name, x in cache.items() if name.startswith(f"blocks.{layer}.")], 1)
        product_of = (torch.eye(pattern.shape[-1], dtype=product_of.dtype) + widened(pattern).mean(1)) / 2 @ product_of
    assert close(mixed.values, product_of.expand_as(mixed.values), SINGLE)
    assert close(mixed.values.sum(-1), torch.ones_like(mixed.values[..., 0]), SINGLE)
