"""The planted truth of each intervening technique, found by the technique and denied by a twin with one mistake."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
from planted import COPIES, READS, RELAY, marked, planted
from prisma_patch import activation_patch, logit_difference
from torch import Tensor
from twins import twin

from prisma_core import HookedViT

BRIGHT, DARK = marked(1.0), marked(-1.0, seed=1)
METRIC = ("a bright mark", "a dark mark")
difference = logit_difference(1, 2)


@cache
def model() -> HookedViT:
    return planted()


def read(scope: object, x: Tensor = BRIGHT) -> float:
    with scope:  # type: ignore[attr-defined]
        return difference(model()(x)).item()


CLEAN = difference(planted()(BRIGHT)).item()


def attribution(linear: ModuleType) -> None:
    """The two heads of the circuit, each with the sign of its exact effect."""
    effects = linear.attribution_patch(model(), BRIGHT, DARK, METRIC)
    exact = activation_patch(model(), BRIGHT, DARK, METRIC)
    assert {(int(layer[1:]), int(head[1:])) for (layer, head, _), _ in effects.top(2)} == {COPIES, READS}
    for layer, head in (COPIES, READS):
        first, real = (each.values[layer, head, 0].item() for each in (effects, exact))
        assert first * real > 0
        assert 0.5 < first / real < 2


def integrated_attribution(linear: ModuleType) -> None:
    """Over all of one hook point the path integral is the exact effect, also where the metric saturates."""

    def saturating(logits: Tensor) -> Tensor:
        return (difference(logits) / 60).tanh()

    exact = activation_patch(model(), BRIGHT, DARK, saturating, at=("resid_pre", 1), over="")
    effects = linear.attribution_patch(model(), BRIGHT, DARK, saturating, at=("resid_pre", 1), over="pos", steps=200)
    assert abs(effects.values.sum() - exact.values[0]) < 1e-3 * abs(exact.values[0])


def paths(module: ModuleType) -> None:
    """The copying head acts on the values of the reading head, and on nothing else."""
    sender = {"sender": ("z", COPIES[0]), "heads": COPIES[1]}
    alone = activation_patch(model(), BRIGHT, DARK, METRIC, at=("z", 0), over="head").sel(head=COPIES[1]).values
    places = {("v_input", READS[1]): 1.0, ("v_input", 0): 0.0, ("q_input", READS[1]): 0.0, ("logits", None): 0.0}
    for (kind, head), share in places.items():
        receivers = "hook_logits" if kind == "logits" else (kind, READS[0])
        along = module.path_patch(
            model(), BRIGHT, DARK, METRIC, receivers=receivers, receiver_heads=head, **sender
        ).values
        assert abs((along / alone).item() - share) < 0.1


def the_switch(module: ModuleType) -> None:
    """One head flips the class token's answer."""
    found = module.switch(model(), BRIGHT, DARK, *METRIC, pos="cls")
    assert found.flipped
    assert found.heads == (READS,)
    assert found.after == "a dark mark"
    assert found.margin > 0


def ablation(module: ModuleType) -> None:
    """Without the reading head there is no answer; without another there still is."""
    at = ("z", READS[0])
    assert abs(read(module.ablate(model(), at, heads=READS[1], pos="cls"))) < 0.1 * CLEAN
    assert read(module.ablate(model(), at, heads=0)) > 0.9 * CLEAN


def mean_ablation(module: ModuleType) -> None:
    """Over one bright and one dark image the answer averages out, and so do the places of the tokens."""
    pair = torch.cat([BRIGHT, DARK])
    scope = module.ablate(model(), ("z", READS[0]), heads=READS[1], method="mean", reference=pair)
    with scope:
        _, seen = model().run_with_cache(BRIGHT, names=("z", READS[0]))
    assert abs(difference(model()(pair)).mean()) < 0.2 * CLEAN
    assert torch.equal(seen["z", READS[0]][0, 0, READS[1]], seen["z", READS[0]][0, 7, READS[1]])


def knocked_out(module: ModuleType) -> None:
    """The class token does not read the relay, all others do, and each row of the pattern sums to one."""
    with module.knock_out(model(), queries="cls", keys=[RELAY], layers=READS[0]):
        _, seen = model().run_with_cache(BRIGHT, names="pattern")
    pattern = seen["pattern", READS[0]][0, READS[1]]
    assert pattern[0, RELAY] == 0
    assert pattern[1:, RELAY].gt(0).all()
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[0]))


def one_way(module: ModuleType) -> None:
    """A patch reads the patches up to itself and the class token, which reads everything; the rows sum to one."""
    with module.causal(model(), layers=READS[0]):
        _, seen = model().run_with_cache(BRIGHT, names="pattern")
    pattern = seen["pattern", READS[0]][0, READS[1]]
    reads = torch.ones(10, 10).tril().bool()
    reads[0] = reads[:, 0] = True
    assert torch.equal(pattern > 0, reads)
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[0]))
    assert (seen["pattern", 1 - READS[0]] > 0).all()


def neighbours(module: ModuleType) -> None:
    """A patch of the grid of 3 x 3 reads its neighbours and the class token, which reads everything."""
    with module.local(model(), 1):
        _, seen = model().run_with_cache(BRIGHT, names="pattern")
    reads = torch.ones(10, 10, dtype=torch.bool)
    for q in range(9):
        for k in range(9):
            reads[1 + q, 1 + k] = abs(q // 3 - k // 3) <= 1 and abs(q % 3 - k % 3) <= 1
    assert torch.equal(seen["pattern", 0][0, 0] > 0, reads)
    torch.testing.assert_close(seen["pattern", 0].sum(-1), torch.ones_like(seen["pattern", 0][..., 0]))


def both(module: ModuleType) -> None:
    """Two interventions at once: each does what it does alone."""
    with module.together(*(module.ablate(model(), ("z", layer), heads=0) for layer in (0, 1))):
        _, seen = model().run_with_cache(BRIGHT, names="z")
    assert not seen["z", 0][:, :, 0].any()
    assert not seen["z", 1][:, :, 0].any()
    assert seen["z", 1][:, :, 1].any()


def steering(module: ModuleType) -> None:
    """Along the answer's direction the answer grows; against it, it turns."""
    direction = torch.zeros(model().spec.d_model, dtype=torch.float64)
    direction[2] = 1.0  # the answer's direction
    at = ("resid_post", READS[0])
    assert read(module.steer(model(), at, direction, 5.0, pos="cls")) > CLEAN + 1
    assert read(module.steer(model(), at, direction, -20.0, pos="cls")) < 0


def projection(module: ModuleType) -> None:
    """A direction of any length is taken out whole."""
    direction = torch.zeros(model().spec.d_model, dtype=torch.float64)
    direction[2] = 3.0
    with module.steer(model(), ("resid_post", READS[0]), direction, 0.0, project=True):
        _, seen = model().run_with_cache(BRIGHT, names=("resid_post", READS[0]))
    assert seen["resid_post", READS[0]][..., 2].abs().max() < 1e-12


def freezing(module: ModuleType) -> None:
    """With the heads of the bright image, the dark one is bright."""
    _, cached = model().run_with_cache(BRIGHT, names="z")
    assert read(module.freeze(model(), cached), DARK) > 0


TRUTHS: dict[str, tuple[str, Callable[[ModuleType], None], str, str]] = {
    "attribution, other way round": ("linear", attribution, "weighted(b - a, gradient)", "weighted(a - b, gradient)"),
    "attribution, without the gradient": (
        "linear",
        attribution,
        "weighted(b - a, gradient).movedim",
        "(b - a).movedim",
    ),
    "integral that stays at its start": (
        "linear",
        integrated_attribution,
        "mixed = between(a, b,",
        "mixed = between(a, a,",
    ),
    "path with nothing frozen": ("paths", paths, "**dict.fromkeys(frozen, hold)", ""),
    "path into all heads": ("paths", paths, ".to(x), receiver_heads, None)", ".to(x), None, None)"),
    "switch, layer and head swapped": ("switches", the_switch, "(each // n_heads, each %", "(each % n_heads, each //"),
    "switch of zeros": ("switches", the_switch, "(places, names, theirs, theirs)", "(places, names, theirs, {})"),
    "ablation that keeps all": ("interventions", ablation, "torch.zeros_like(x)", "x"),
    "ablation of every head": (
        "interventions",
        ablation,
        "names, pos, heads, neurons)\n\n",
        "names, pos, None, neurons)\n\n",
    ),
    "mean of each token by itself": (
        "interventions",
        mean_ablation,
        '("batch", *TOKEN_AXES)',
        '("batch",)',
    ),
    "knock-out behind the softmax alone": ("masks", knocked_out, "**dict.fromkeys(names, scores),", ""),
    "knock-out of the keys as queries": (
        "masks",
        knocked_out,
        "_among(layout, queries, n_queries)",
        "_among(layout, keys, n_queries)",
    ),
    "causal that looks ahead": ("masks", one_way, "dtype=torch.bool).triu(1)", "dtype=torch.bool).tril(-1)"),
    "causal that hides itself": ("masks", one_way, "dtype=torch.bool).triu(1)", "dtype=torch.bool).triu(0)"),
    "causal for the class token too": ("masks", one_way, "    mask[:n] = False\n", ""),
    "local by the nearer axis": ("masks", neighbours, "far = torch.maximum(", "far = torch.minimum("),
    "local, rows of another width": (
        "masks",
        neighbours,
        "places // layout.columns % layout.rows",
        "places // 2 % layout.rows",
    ),
    "two scopes, of which the first is opened": (
        "interventions",
        both,
        "for scope in self.scopes:",
        "for scope in self.scopes[:1]:",
    ),
    "steering the other way": ("interventions", steering, "moved = x + (scale", "moved = x - (scale"),
    "projection on a direction that is no unit": ("interventions", projection, "unit = (d / d.norm())", "unit = d"),
    "freezing that holds nothing": ("interventions", freezing, "return held[at.name].to(x)", "return x"),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_the_truth_is_found_and_the_twin_is_caught(name: str) -> None:
    module, truth, right, wrong = TRUTHS[name]
    technique = importlib.import_module(f"prisma_patch.{module}")
    broken = twin(technique, right, wrong)
    truth(technique)
    with pytest.raises(AssertionError):
        truth(broken)
