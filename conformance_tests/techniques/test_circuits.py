"""Circuits: the planted one is found, exact at both ends, and written in EAP-IG's layout."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import VARIANTS, build
from planted import READS, marked, planted
from planted_dual import planted_dual
from prisma_patch import (
    Circuit,
    circuit_faithfulness,
    edge_effects,
    edge_scores,
    find_circuit,
    logit_difference,
    path_patch,
    run_circuit,
)
from torch import Tensor
from twins import twin

from prisma_core import HookedViT, InputError, LoadError, NotApplicable, UnknownName

EXACT = {"rtol": 1e-9, "atol": 1e-9}
BRIGHT, DARK = marked(1.0, batch=2), marked(-1.0, seed=1, batch=2)
METRIC = ("a bright mark", "a dark mark")
TRUTH = {"input->a0.h1<v>", "a0.h1->a1.h2<v>", "a1.h2->logits"}


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return planted()


@pytest.fixture
def pair(in_float64: None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 2, 3, 8, 12, generator=generator).unbind(0))  # type: ignore[return-value]


REFUSED = {"res_post": "norms the sum", "side by side": "side by side", "attention only, grouped": "shares keys"}
TAKEN = {name: facts for name, facts in VARIANTS.items() if name not in REFUSED}


def metric(output: Tensor) -> Tensor:
    return output.flatten(1)[:, :5].sum(1)


# -------------------------------------------------------------------- the planted circuit


@pytest.mark.parametrize("steps", [0, 3])
def test_the_planted_circuit_is_found(model: HookedViT, steps: int) -> None:
    scores, whole = edge_scores(model, BRIGHT, DARK, METRIC, steps=steps)
    assert {f"{source}->{target}" for (source, target), _ in scores.top(3)} == TRUTH
    assert all(value < 0 for _, value in scores.top(3))  # the dark mark lowers the bright one's lead
    assert abs(scores.top(4)[3][1]) < 0.05 * abs(scores.top(3)[2][1])
    circuit = whole.top(3)
    assert set(circuit.edges) == TRUTH
    assert circuit.nodes == ("input", "a0.h1", "a1.h2", "logits")
    measures = circuit_faithfulness(model, circuit, BRIGHT, DARK, METRIC).values
    torch.testing.assert_close(measures, torch.ones_like(measures), rtol=0, atol=0.05)
    wrong = circuit_faithfulness(model, whole.top(40).without(*TRUTH), BRIGHT, DARK, METRIC).values
    assert wrong.abs().max() < 0.05


def test_a_small_circuit_is_found_by_halving(model: HookedViT) -> None:
    assert set(find_circuit(model, BRIGHT, DARK, METRIC).edges) == TRUTH


def truth(circuits: ModuleType) -> None:
    """Scores of the planted edges equal their exact effects, and the rest of the model is not needed."""
    scores, whole = circuits.edge_scores(planted(), BRIGHT, DARK, METRIC)
    circuit = whole.top(3)
    assert set(circuit.edges) == TRUTH
    exact = circuits.edge_effects(planted(), sorted(TRUTH), BRIGHT, DARK, METRIC)
    for edge, effect in zip(sorted(TRUTH), exact.values.tolist(), strict=True):
        source, target = edge.split("->")
        assert abs(scores.sel(source=source, target=target).values.item() / effect - 1) < 0.1
    measures = circuits.circuit_faithfulness(planted(), circuit, BRIGHT, DARK, METRIC).values
    assert (measures - 1).abs().max() < 0.05


TWINS = {
    "scores the other way round": ("circuits", "outputs(corrupt) - graph.outputs(clean)", "outputs(clean)"),
    "completeness of the circuit itself": ("circuits", "circuit.complement(), clean", "circuit, clean"),
    "circuit inside out": ("wiring", "self.shape.real() & ~circuit.kept", "self.shape.real() & circuit.kept"),
    "edges that carry nothing": ("wiring", "theirs[n : n + len(rows)] - rows", "-rows"),
    "gradients of half a step": ("wiring", "return x + zeros", "return x + 0.5 * zeros"),
}


@pytest.mark.parametrize("name", TWINS)
def test_the_truth_is_found_and_the_twin_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right, wrong = TWINS[name]
    circuits = importlib.import_module("prisma_patch.circuits")
    broken = twin(importlib.import_module(f"prisma_patch.{module}"), right, wrong)
    truth(circuits)
    if module == "wiring":
        monkeypatch.setattr(circuits, "Graph", broken.Graph)
        broken = circuits
    with pytest.raises(AssertionError):
        truth(broken)


# -------------------------------------------------------------------- exact at both ends


@pytest.mark.parametrize("facts", TAKEN.values(), ids=TAKEN)
def test_all_edges_are_the_clean_run_and_none_the_corrupt_one(
    facts: dict[str, Any], pair: tuple[Tensor, Tensor]
) -> None:
    model = build(**facts)
    clean, corrupt = pair
    _, whole = edge_scores(model, clean, corrupt, metric)
    torch.testing.assert_close(run_circuit(model, whole, clean, corrupt), model(clean), **EXACT)
    torch.testing.assert_close(run_circuit(model, whole.complement(), clean, corrupt), model(corrupt), **EXACT)
    half = run_circuit(model, whole.top(int(whole.kept.sum()) // 2), clean, corrupt)
    assert min((half - model(each)).abs().max() for each in pair) > 1e-3


@pytest.mark.parametrize("facts", TAKEN.values(), ids=TAKEN)
def test_scores_are_the_derivative_of_exact_effects(facts: dict[str, Any], pair: tuple[Tensor, Tensor]) -> None:
    """Where the corrupt input is hardly another, the first order is all there is."""
    model = build(**facts)
    clean, corrupt = pair[0], pair[0] + 1e-5 * pair[1]
    scores, whole = edge_scores(model, clean, corrupt, metric)
    every = whole.edges
    edges = [every[at] for at in range(0, len(every), len(every) // 12)]
    exact = edge_effects(model, edges, clean, corrupt, metric).values
    first = torch.stack([scores.values[whole.index(edge)] for edge in edges])
    torch.testing.assert_close(first, exact, rtol=1e-2, atol=1e-4 * float(exact.abs().max()))


def test_one_edge_is_a_direct_path(pair: tuple[Tensor, Tensor]) -> None:
    model = build(layers=3, scale=True)
    for sender, target, kind in ((0, "a2.h3<v>", "v_input"), (1, "a2.h3<q>", "q_input")):
        exact = edge_effects(model, [f"a{sender}.h1->{target}"], *pair, metric).values
        along = path_patch(model, *pair, metric, ("z", sender), (kind, 2), heads=1, receiver_heads=3).values.mean()
        torch.testing.assert_close(exact[0], along, **EXACT)
        assert exact.abs() > 1e-4
    direct = path_patch(model, *pair, metric, ("z", 0), heads=1).values.mean()
    torch.testing.assert_close(edge_effects(model, ["a0.h1->logits"], *pair, metric).values[0], direct, **EXACT)


@pytest.mark.parametrize("name", REFUSED)
def test_models_whose_heads_write_no_terms_are_refused(name: str, pair: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(NotApplicable, match=f"Layer 0 .*{REFUSED[name]}"):
        edge_scores(build(**VARIANTS[name]), *pair, metric)


# -------------------------------------------------------------------- pruning, and files


def test_edges_that_lead_nowhere_are_pruned(model: HookedViT) -> None:
    _, whole = edge_scores(model, BRIGHT, DARK, METRIC)
    loose = whole.only([*TRUTH, "input->m0", "m1->logits", "a0.h0->a1.h1<k>"])
    assert set(loose.pruned().edges) == TRUTH
    assert whole.only(["input->m0"]).pruned().edges == ()


def test_a_circuit_without_edges_is_another_one(model: HookedViT) -> None:
    _, whole = edge_scores(model, BRIGHT, DARK, METRIC)
    before, edge = whole.edges, whole.edges[0]
    assert set(whole.without(edge).edges) == set(before) - {edge}
    assert whole.without(*before).complement().edges == before
    assert whole.edges == before


def test_a_circuit_is_written_in_eap_igs_layout(model: HookedViT, tmp_path: Path) -> None:
    _, whole = edge_scores(model, BRIGHT, DARK, METRIC)
    circuit = whole.top(3)
    data = json.loads(circuit.save(tmp_path / "circuit.json").read_text())
    assert data["cfg"] == {"n_layers": 2, "n_heads": 3, "d_model": 24, "parallel_attn_mlp": False}
    assert list(data["nodes"]) == [
        "input",
        *(f"a0.h{h}" for h in range(3)),
        "m0",
        *(f"a1.h{h}" for h in range(3)),
        "m1",
        "logits",
    ]
    assert data["nodes"]["a0.h1"] == {"in_graph": True}
    assert data["nodes"]["m1"] == {"in_graph": False}
    assert {name for name, edge in data["edges"].items() if edge["in_graph"]} == TRUTH
    # Each of 9 inputs of heads and one of an MLP in two layers, and the logits: 1*9 + 4 + 5*9 + 8 + 9 edges.
    assert len(data["edges"]) == 75
    again = Circuit.load(tmp_path / "circuit.json")
    assert again.edges == circuit.edges
    torch.testing.assert_close(again.scores.double(), circuit.scores, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(run_circuit(model, again, BRIGHT, DARK), run_circuit(model, circuit, BRIGHT, DARK))


def test_eap_igs_own_class_reads_and_writes_our_files(model: HookedViT, tmp_path: Path) -> None:
    theirs = pytest.importorskip("eap.graph", reason="EAP-IG (github.com/hannamw/EAP-IG) is not installed").Graph
    circuit = edge_scores(model, BRIGHT, DARK, METRIC)[1].top(3)
    graph = theirs.from_json(str(circuit.save(tmp_path / "ours.json")))
    assert {name for name, edge in graph.edges.items() if edge.in_graph} == TRUTH
    graph.to_json(str(tmp_path / "theirs.json"))
    again = Circuit.load(tmp_path / "theirs.json")
    assert again.edges == circuit.edges
    torch.testing.assert_close(again.scores.double(), circuit.scores, rtol=1e-6, atol=1e-7)


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no cfg": (lambda data: data.pop("cfg"), "cfg"),
    "an edge of no model": (lambda data: data["edges"].update({"m1->m0": {"score": 0, "in_graph": True}}), "m1->m0"),
    "an edge without a score": (lambda data: data["edges"]["input->m0"].pop("score"), "score"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_no_circuit_are_said(model: HookedViT, tmp_path: Path, case: str) -> None:
    spoil, fact = BAD[case]
    _, whole = edge_scores(model, BRIGHT, DARK, METRIC)
    path = whole.save(tmp_path / "circuit.json")
    data = json.loads(path.read_text())
    spoil(data)
    path.write_text(json.dumps(data))
    with pytest.raises(LoadError, match=fact):
        Circuit.load(path)


def test_of_a_dual_encoder_a_tower_is_taken() -> None:
    clip, images = planted_dual(), torch.cat([marked(1.0), marked(-1.0, seed=1)])
    tokens = clip.tokens(["a bright mark", "a cat"])
    for given in ((images[:1], tokens), images[:1]):
        with pytest.raises(NotApplicable, match=r"model\.vision"):
            edge_scores(clip, given, given, 0)
        with pytest.raises(NotApplicable, match=r"model\.vision"):
            circuit_faithfulness(clip, edge_scores(planted(), images, images.flip(0), 1)[1], given, given, 0)
    words = clip.encode_text(tokens)

    def difference(vectors: Tensor) -> Tensor:
        return clip.compare(vectors, words)[:, 0]

    scores, whole = edge_scores(clip.vision, images[:1], images[1:], difference, steps=8)
    (best, *_), _ = scores.top(1)[0]
    assert best == f"a{READS[0]}.h{READS[1]}"
    found = circuit_faithfulness(clip.vision, whole, images[:1], images[1:], difference)
    torch.testing.assert_close(found.values, torch.ones(2).to(found.values))
    with pytest.raises(InputError, match=r"one number for each image.*\[1, 2\]"):
        edge_scores(clip.vision, images[:1], images[1:], lambda vectors: clip.compare(vectors, words))


def test_bad_input_names_what_there_is(model: HookedViT, pair: tuple[Tensor, Tensor]) -> None:
    _, whole = edge_scores(model, BRIGHT, DARK, METRIC)
    with pytest.raises(UnknownName, match=r"a0\.h1->a1\.h2<v>"):
        whole.only(["a0.h1->a1.h2<w>"])
    for backwards in ("m1->m0", "m0->m0", "a1.h0->a1.h1<k>", "m0->a0.h0<q>"):
        with pytest.raises(UnknownName, match="No edge"):
            whole.only([backwards])
    with pytest.raises(InputError, match="1 to 75, got 80"):
        whole.top(80)
    with pytest.raises(InputError, match=r"\[2, 3, 6, 6\].*\[1, 3, 6, 6\]"):
        edge_scores(model, BRIGHT, DARK[:1], METRIC)
    with pytest.raises(InputError, match="n_heads=4"):
        run_circuit(build(), whole, *pair)
    with pytest.raises(InputError, match="differ in it"):
        circuit_faithfulness(model, whole, BRIGHT, BRIGHT, logit_difference(1, 2))
