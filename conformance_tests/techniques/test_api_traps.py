"""Calls that look right and are not: a scope in a model's place, a cache in that of images, one class twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import prisma_lens as lens
import prisma_patch as patch
import prisma_registers as registers
import prisma_sae as sae
import pytest
import torch
from models import build

from prisma_core import HookedViT, InputError, PrismaError, UnknownName
from prisma_core.plugin import Preprocess

X = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))


@cache
def model() -> HookedViT:
    made = build(registers=2, n_classes=5).float()
    made.preprocess = Preprocess(size=(8, 12))
    return made


def coder() -> sae.SparseCoder:
    d = model().spec.d_model
    shapes = {"W_enc": (d, 7), "b_enc": (7,), "W_dec": (7, d), "b_dec": (d,)}
    facts = sae.CoderFacts(kind="standard", d_in=d, d_sae=7, d_out=d, hook="blocks.0.hook_resid_pre")
    return sae.SparseCoder(facts, {name: torch.zeros(shape) for name, shape in shapes.items()})


INSIDE: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda given: lens.attribute(model(), given, 1),
    "attribute by neuron": lambda given: lens.attribute(model(), given, 1, by="neuron"),
    "fit_tuned_lens": lambda given: lens.fit_tuned_lens(model(), [given], epochs=1),
    "gradient_x_activation": lambda given: lens.gradient_x_activation(model(), given, 1),
    "relevance": lambda given: lens.relevance(model(), given, 1),
    "edge_scores": lambda given: patch.edge_scores(model(), given[:1], given[1:], (1, 2)),
    "attribution_patch": lambda given: patch.attribution_patch(
        model(), given[:1], given[1:], (1, 2), at="z", over="layer head"
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_gradients_are_not_taken_in_inference_mode(name: str) -> None:
    with torch.no_grad():
        INSIDE[name](X)
    with torch.inference_mode(), pytest.raises(PrismaError, match=r"torch\.inference_mode"):
        INSIDE[name](X)


@pytest.mark.parametrize("kept", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_cache_in_another_dtype_than_the_models(dtype: torch.dtype, kept: torch.dtype) -> None:
    """It is read, as exactly as the coarser of the two is."""
    made, images = build(registers=2, n_classes=5).to(dtype), X.to(dtype)
    _, cache = made.run_with_cache(images, dtype=kept)
    loose = max(torch.finfo(dtype).eps, torch.finfo(kept).eps)
    for read in (lens.logit_lens, lambda *given: lens.attribute(*given, 1, by="head")):
        found, expected = (read(made, given).values.double() for given in (cache, images))
        assert (found - expected).abs().max() <= 20 * loose * expected.abs().max()


def test_a_cache_made_in_inference_mode_is_not_attributed() -> None:
    with torch.inference_mode():
        _, made = model().run_with_cache(X)
    with pytest.raises(InputError, match=r"made in torch\.inference_mode.*torch\.no_grad"):
        lens.attribute(model(), made, 1)


SCOPES: dict[str, Callable[[], Any]] = {
    "hooks": lambda: model().hooks({"z": lambda x, at: None}),
    "caching": lambda: model().caching("z"),
    "splice": lambda: sae.splice(model(), coder()),
    "without_registers": lambda: registers.without_registers(model()),
    "extra_registers": lambda: registers.extra_registers(model(), 1),
    "registers_at_test_time": lambda: registers.registers_at_test_time(model(), [registers.Neuron(0, 1)]),
    "ablate": lambda: patch.ablate(model(), "z"),
    "knock_out": lambda: patch.knock_out(model(), 0, [1]),
    "causal": lambda: patch.causal(model()),
    "steer": lambda: patch.steer(model(), ("resid_post", 0), torch.ones(model().spec.d_model)),
    "freeze": lambda: patch.freeze(model(), model().run_with_cache(X, names="z")[1]),
    "together": lambda: patch.together(patch.causal(model()), patch.ablate(model(), ("z", 1))),
}


@pytest.mark.parametrize("name", SCOPES)
def test_a_scope_that_nobody_entered_is_no_model_and_no_decorator(name: str) -> None:
    scope = SCOPES[name]()
    for given in (X, lambda: None):
        with pytest.raises(PrismaError, match=r"[Ee]nter it.*with"):
            scope(given)
    assert not model().open_hooks()
    with scope:
        pass
    assert not model().open_hooks()


def test_several_scopes_are_closed_again_where_one_cannot_be_opened() -> None:
    used = patch.causal(model())
    with used:
        pass
    with pytest.raises(PrismaError, match="entered before"), patch.together(patch.ablate(model(), "z"), used):
        pass
    assert not model().open_hooks()


RUNNING: dict[str, Callable[[Any], Any]] = {
    "head_scores": lambda given: lens.head_scores(model(), given),
    "rollout": lambda given: lens.rollout(model(), given),
    "attention_flow": lambda given: lens.attention_flow(model(), given, 0),
    "induction": lambda given: lens.induction(model(), given),
    "activation_patch": lambda given: patch.activation_patch(model(), given, X, 0),
    "path_patch": lambda given: patch.path_patch(model(), X, given, 0, ("z", 0), ("q", 1)),
}


@pytest.mark.parametrize("name", RUNNING)
def test_what_runs_the_model_itself_takes_no_cache(name: str) -> None:
    given = model().run_with_cache(X)[1]
    with pytest.raises(InputError, match="got ActivationCache"):
        RUNNING[name](given)


@pytest.mark.parametrize("index", [-1, -99, 5])
def test_classes_count_from_zero(index: int) -> None:
    for call in (
        lambda: lens.attribute(model(), X, index),
        lambda: lens.logit_lens(model(), X, index),
        lambda: patch.patch_heads(model(), X[:1], X[1:], index),
        lambda: lens.logit(index)(model()(X)),
    ):
        with pytest.raises(UnknownName, match=f"No class {index}"):
            call()


def test_a_class_is_not_subtracted_from_itself() -> None:
    for call in (
        lambda: lens.attribute(model(), X, 1, against=1),
        lambda: lens.logit_lens(model(), X, [0, 1], against=[0, 1]),
        lambda: patch.patch_heads(model(), X[:1], X[1:], (2, 2)),
    ):
        with pytest.raises(InputError, match=r"the same|twice"):
            call()


def test_what_is_subtracted_needs_what_it_is_subtracted_from() -> None:
    for options in ({"against": 1}, {"labels": ["a"]}):
        with pytest.raises(InputError, match="Expected a target"):
            lens.logit_lens(model(), X, **options)  # type: ignore[arg-type]
