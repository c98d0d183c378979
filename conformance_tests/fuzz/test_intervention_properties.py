"""Interventions, gradients and circuits on models of any spec: each is what hooks written by hand do.

A technique may refuse a model, with a reason: such cases are not counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from prisma_lens import gradient_x_activation, head_scores, integrated_gradients, relevance
from prisma_patch import ablate, attribution_patch, edge_scores, freeze, knock_out, run_circuit, steer
from torch import Tensor

from prisma_core import HookedModel, InputError, NotApplicable
from prisma_core.plugin import widened

from .drawing import Drawn, close, models
from .test_technique_properties import REFUSING, changed, run

STEP = 1e-5
TOKENS = ("pos", "query_pos")
FIRST_ORDER = 1e-4  # of the difference quotient


def places(data: st.DataObject, n: int) -> list[int]:
    """Draw some of ``n`` places."""
    return sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))


def chosen(model: HookedModel, name: str, x: Tensor, data: st.DataObject) -> tuple[dict[str, Any], Tensor]:
    """Draw which tokens and heads of an activation are meant: the arguments, and a mask of them."""
    axes, given, mask = model.hook_points()[name].axes.split(), dict[str, Any](), torch.ones_like(x, dtype=torch.bool)
    for argument, kinds in (("pos", TOKENS), ("heads", ("head",))):
        axis = next((axes.index(kind) for kind in kinds if kind in axes), None)
        if axis is None or data.draw(st.booleans()):
            continue
        given[argument] = places(data, x.shape[axis])
        on = torch.zeros(x.shape[axis], dtype=torch.bool)
        on[given[argument]] = True
        mask = mask & on.view([-1 if each == axis else 1 for each in range(x.ndim)])
    return given, mask


@given(models(), st.sampled_from(["zero", "mean", "resample"]), st.data())
@torch.no_grad()
def test_an_ablation_is_the_hook_by_hand(drawn: Drawn, method: str, data: st.DataObject) -> None:
    model, name, others = drawn.model, drawn.names[0], changed(drawn.inputs)
    _, cache = model.run_with_cache(*others, names=name)
    theirs, axes = cache[name], model.hook_points()[name].axes.split()
    assume(axes[0] == "batch")
    options, mask = chosen(model, name, theirs, data)
    over = [at for at, axis in enumerate(axes) if axis in ("batch", "pos", "query_pos", "patch")]
    value = {"zero": torch.zeros_like(theirs), "mean": theirs.mean(over, keepdim=True), "resample": theirs.roll(1, 0)}
    reference = {} if method == "zero" else {"reference": others}
    with run(ablate, model, name, method=method, **reference, **options):
        ours = model(*drawn.inputs)

    def put(x: Tensor, at: Any) -> Tensor:
        return torch.where(mask, value[method], x)

    assert close(ours, model.run_with_hooks(*drawn.inputs, hooks={name: put}))


@given(models(), st.floats(-3, 3), st.booleans(), st.data())
@torch.no_grad()
def test_steering_and_freezing_are_the_hook_by_hand(
    drawn: Drawn, scale: float, project: bool, data: st.DataObject
) -> None:
    model, name = drawn.model, drawn.names[0]
    clean, cache = model.run_with_cache(*drawn.inputs, names=name)
    held = cache[name]
    options, mask = chosen(model, name, held, data)
    options.pop("heads", None)
    axes = model.hook_points()[name].axes.split()
    assume("head" not in axes or "pos" not in options)
    mask = mask if "pos" in options else torch.ones_like(mask)
    direction = torch.linspace(-1, 2, held.shape[-1], dtype=held.dtype)
    assume(bool(direction.any()))
    unit = direction / direction.norm()

    def push(x: Tensor, at: Any) -> Tensor:
        moved = x + scale * direction - ((x @ unit)[..., None] * unit if project else 0)
        return torch.where(mask, moved, x)

    with run(steer, model, name, direction, scale, project=project, **options):
        ours = model(*drawn.inputs)
    assert close(ours, model.run_with_hooks(*drawn.inputs, hooks={name: push}))
    with run(freeze, model, cache, name):
        frozen = model(*changed(drawn.inputs))
    assert close(frozen, model.run_with_hooks(*changed(drawn.inputs), hooks={name: lambda x, at: held}))
    with run(freeze, model, cache, name):
        assert close(model(*drawn.inputs), clean)


@REFUSING
@given(models(["vision", "text"]), st.data())
@torch.no_grad()
def test_a_knock_out_is_the_pattern_without_its_keys(drawn: Drawn, data: st.DataObject) -> None:
    model = drawn.model
    names = [name for name in model.hook_points() if name.startswith("blocks.") and name.endswith("hook_pattern")]
    _, cache = model.run_with_cache(*drawn.inputs, names=names)
    n = cache[names[0]].shape[-1]
    layers, queries, keys = places(data, drawn.spec.n_layers), places(data, n), places(data, n)
    hidden = torch.zeros(n, n, dtype=torch.bool)
    hidden[torch.tensor(queries)[:, None], keys] = True
    with run(knock_out, model, queries, keys, layers=layers):
        ours, seen = model.run_with_cache(*drawn.inputs, names=names)

    def shared(x: Tensor, at: Any) -> Tensor:
        if int(at.name.split(".")[1]) not in layers:
            return x
        left = x.masked_fill(hidden, 0)
        return left / left.sum(-1, keepdim=True).where(left.any(-1, keepdim=True), 1)

    assume(all(bool((x[x > 0] > 1e-6).all()) for x in cache.values()))  # else what is left over is a rounding error
    assert close(ours, model.run_with_hooks(*drawn.inputs, hooks=dict.fromkeys(names, shared)), 1e-6)
    for name in names:
        if int(name.split(".")[1]) in layers:
            assert not seen[name][..., hidden].any()


@REFUSING
@given(models(["vision", "text"]))
def test_gradients_are_those_of_what_is_added_there(drawn: Drawn) -> None:
    model, name = drawn.model, drawn.names[0]
    with torch.no_grad():
        output, cache = model.run_with_cache(*drawn.inputs, names=name)
    a = cache[name]

    def metric(output: Tensor) -> Tensor:
        return output.flatten(1).tanh().sum(-1)

    added = torch.zeros_like(a, requires_grad=True)
    moved = model.run_with_hooks(*drawn.inputs, hooks={name: lambda x, at: x + added})
    (gradient,) = torch.autograd.grad(metric(moved).sum(), added, allow_unused=True)
    gradient = torch.zeros_like(a) if gradient is None else gradient
    found = run(gradient_x_activation, model, drawn.inputs, metric, name)
    assert close(found.values, torch.where(gradient == 0, 0, a * gradient).sum(-1))
    whole = run(integrated_gradients, model, drawn.inputs, metric, name, steps=3)
    with torch.no_grad():
        start = metric(model.run_with_hooks(*drawn.inputs, hooks={name: lambda x, at: torch.zeros_like(x)}))
    change = metric(output) - start
    assert close(whole.tensors["total"], change)
    gap = (whole.values.reshape(len(change), -1).sum(1) - change).abs().max()
    assert close(torch.tensor(whole.facts["gap"], dtype=gap.dtype), gap)


@REFUSING
@given(models(), st.data())
def test_attribution_patching_is_the_slope_towards_the_other_run(drawn: Drawn, data: st.DataObject) -> None:
    model, name, others = drawn.model, drawn.names[0], changed(drawn.inputs)

    def metric(output: Tensor) -> Tensor:
        return output.flatten(1).tanh().sum(-1)

    found = run(attribution_patch, model, drawn.inputs, others, metric, at=name, over=())
    with torch.no_grad():
        _, theirs = model.run_with_cache(*others, names=name)
        _, ours = model.run_with_cache(*drawn.inputs, names=name)
        assume(drawn.spec.kind != "dual" or len(ours[name]) == len(drawn.inputs[0]))
        way = torch.where(theirs[name] == ours[name], 0, theirs[name] - ours[name])  # masked scores are infinite
        assume(bool(way.isfinite().all()))
        ends = [
            metric(model.run_with_hooks(*drawn.inputs, hooks={name: lambda x, at, s=sign: x + s * STEP * way}))
            for sign in (1, -1)
        ]
    slope = (ends[0] - ends[1]) / (2 * STEP)
    assert close(found.values.sum(), slope.sum(), FIRST_ORDER)  # of an image's effect on the others' there is none
    if drawn.spec.kind != "dual":
        assert close(found.values, slope, FIRST_ORDER)


@REFUSING
@given(models(["vision", "text"]), st.data())
@torch.no_grad()
def test_a_circuit_of_all_edges_is_the_clean_run_and_of_none_the_corrupt_one(drawn: Drawn, data: st.DataObject) -> None:
    model, (clean,), (corrupt,) = drawn.model, drawn.inputs, changed(drawn.inputs)

    def metric(output: Tensor) -> Tensor:
        return output.flatten(1).tanh().sum(-1)

    if drawn.spec.kind == "text":
        tokens = torch.equal(model.shares(clean), model.shares(corrupt))
        masks = drawn.spec.pad_id is None or torch.equal(clean == drawn.spec.pad_id, corrupt == drawn.spec.pad_id)
        if not (tokens and masks):
            with pytest.raises((InputError, NotApplicable), match=r"the same length|stream"):
                edge_scores(model, clean, corrupt, metric)
            return
    scores, whole = run(edge_scores, model, clean, corrupt, metric)
    assert close(run_circuit(model, whole, clean, corrupt), model(clean))
    assert close(run_circuit(model, whole.complement(), clean, corrupt), model(corrupt))
    edge = data.draw(st.sampled_from(whole.edges))
    source, target = whole.index(edge)
    assert close(scores.values[source, target], whole.scores[source, target].to(scores.values))


@REFUSING
@given(models(["vision"]))
def test_scores_and_relevance_of_heads_are_sums_over_the_patterns(drawn: Drawn) -> None:
    model, images = drawn.model, drawn.inputs[0]
    names = [name for name in model.hook_points() if name.startswith("blocks.") and name.endswith("hook_pattern")]
    found = run(head_scores, model, images, batch_size=2)
    _, cache = model.run_with_cache(images, names=names, loss=lambda output: output[:, 0].sum())
    layout = model.layout_for(images)
    layers = [[name for name in names if name.startswith(f"blocks.{at}.")] for at in range(drawn.spec.n_layers)]
    patterns = [torch.cat([cache[name] for name in each], 1).detach() for each in layers]
    here = range(layout.n_prefix, layout.n_tokens)
    alone = torch.stack([x[:, :, here, here].mean((0, 2)) for x in patterns])
    assert close(found.sel(kind="self").values, widened(alone), 1e-5)
    if layout.n_prefix and "cls" in found.names("kind"):
        token = torch.stack([x[:, :, layout.n_prefix :, 0].mean((0, 2)) for x in patterns])
        assert close(found.sel(kind="cls").values, widened(token), 1e-5)
    assume(drawn.spec.pool.kind not in ("none", "patches"))
    rows = run(relevance, model, images, lambda output: output[:, 0]).values
    total = torch.eye(rows.shape[-1], dtype=rows.dtype)
    for each in layers:
        support = torch.cat([cache[name] * cache.grad[name] for name in each], 1).relu().mean(1)
        total = total + support @ total
    assert close(rows, total.detach() - torch.eye(rows.shape[-1], dtype=rows.dtype))
