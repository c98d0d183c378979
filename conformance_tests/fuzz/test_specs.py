"""Canonical models of any spec: every hook point has its equation, components sum, rewrites keep the output."""

from __future__ import annotations

from contextlib import suppress

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from prisma_conformance.checks.algebra import equations
from prisma_conformance.checks.equations import edited_pass
from prisma_conformance.strategies import SEEDS, random_model, specs, text_specs, vision_specs

from prisma_core.errors import NotApplicable
from prisma_core.saving.facts import SavedFacts
from prisma_core.spec import AnySpec, ModelSpec, TextSpec
from prisma_core.transformer import rewrites

from .drawing import Drawn, close, models

# Norms of two or three channels that hardly differ magnify rounding, a thousandfold each.
CHAINED = 1e-7


@given(specs())
def test_a_spec_survives_json(spec: AnySpec) -> None:
    assert SavedFacts.model_validate_json(SavedFacts(spec=spec).to_json()).spec == spec


@given(specs(), SEEDS)
@torch.no_grad()
def test_every_hook_point_holds_its_equation(spec: AnySpec, seed: int) -> None:
    model = random_model(spec, seed)
    inputs = model.sample_inputs(2, generator=torch.Generator().manual_seed(seed))
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    names = list(model.hook_points())
    _, cache = model.run_with_cache(*inputs, names=names)
    errors = equations(model, inputs, cache.store)
    assert {point for point, _ in errors} == set(names)
    assert not {point: error for (point, _), error in errors.items() if not error <= CHAINED}


@given(specs(), SEEDS, st.booleans())
@torch.no_grad()
def test_every_equation_holds_with_every_hook_point_edited(spec: AnySpec, seed: int, derived: bool) -> None:
    model, generator = random_model(spec, seed), torch.Generator().manual_seed(seed)
    inputs = model.sample_inputs(2, generator=generator)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    points = [name for name, point in model.hook_points().items() if derived or not point.derived]
    before, after = edited_pass(model, inputs, points, generator)
    errors = equations(model, inputs, after, before)
    unread = set(points) - {point for point, _ in errors}
    assert all(point.endswith("hook_pos_embed") for point in unread)  # full_embed's equation reads it
    assert not {point: error for (point, _), error in errors.items() if not error <= CHAINED}


@given(models(["vision", "text"]))
@torch.no_grad()
def test_components_sum_to_the_stream(drawn: Drawn) -> None:
    assume(not any(block.kind == "post" for block in drawn.spec.blocks))
    _, cache = drawn.model.run_with_cache(*drawn.inputs)
    stream = cache["resid_post", -1]
    assert close(cache.decompose_resid().sum(0), stream)
    for method in (cache.stack_head_results, cache.stack_neuron_results):
        try:
            stack = method(incl_remainder=True)
        except NotApplicable:
            continue
        assert close(stack.sum(0), stream, CHAINED)


@given(st.one_of(vision_specs(video=False), text_specs()), SEEDS)
@torch.no_grad()
def test_attributions_sum_to_the_output(spec: ModelSpec | TextSpec, seed: int) -> None:
    model = random_model(spec, seed)
    inputs = model.sample_inputs(2, generator=torch.Generator().manual_seed(seed))
    output, cache = model.run_with_cache(*(x.double() if x.is_floating_point() else x for x in inputs))
    try:
        index = seed % output.shape[-1]
        total = cache.logit_attrs(cache.decompose_resid(), index).sum(0) + cache.logit_constant(index)
    except NotApplicable:
        assume(False)
    assert close(total, output[..., index], CHAINED)


REWRITES = st.sampled_from(
    [
        rewrites.fold_layer_norm,
        rewrites.fold_layer_scale,
        rewrites.center_writing_weights,
        rewrites.fold_value_biases,
        rewrites.refactor_factored_attn_matrices,
    ]
)


@given(models(["vision"]), st.lists(REWRITES, min_size=1, max_size=3, unique=True))
@torch.no_grad()
def test_rewrites_keep_the_output(drawn: Drawn, several: list[rewrites.Rewrite]) -> None:
    before = drawn.model(*drawn.inputs)
    state = {name: tensor.clone() for name, tensor in drawn.model.state_dict().items()}
    rewritten = drawn.model
    for each in several:
        with suppress(NotApplicable):  # then the others stand, and nothing of this one
            rewritten = rewrites.rewrite(rewritten, each)
    assume(rewritten is not drawn.model)  # at least one applies
    assert close(rewritten(*drawn.inputs), before, CHAINED)
    assert all(torch.equal(tensor, state[name]) for name, tensor in drawn.model.state_dict().items())
