"""Circuits: the edges between heads, MLPs, input and logits that carry a behaviour, scored, pruned and tested.

Equation:
    score(u -> v) = sum_i (u_i(corrupt) - u_i(clean)) * d metric / d v_i, v what the target reads of the stream: the
    change of the metric, to first order, when the edge alone carries the corrupt run. Integrated (EAP-IG), the gradient
    is the mean over ``steps`` inputs between the corrupt and the clean one. In a circuit every edge that is left out
    carries what its source writes in the corrupt run.
    faithfulness = (m(circuit) - m(corrupt)) / (m(clean) - m(corrupt)); completeness is one minus the same of all other
    edges.
Cost:
    Two passes and one with gradients (``steps`` of them) for all scores; one pass for a circuit, which holds what every
    head reads and writes: memory grows with sources x tokens x d_model.
Misleads:
    First order: a saturated softmax hides an edge (integrate, and check with ``edge_effects``). Faithfulness depends on
    the corrupt image; edges that both images use alike (positions) get no score. Averages over pairs hide that pairs
    differ. A circuit of edges says nothing about which tokens they carry.
Source:
    Syed et al. 2023 (edge attribution patching); Hanna et al. 2024, "Have Faith in Faithfulness" (EAP-IG); Wang et al.
    2023 (faithfulness, completeness).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from einops import einsum
from prisma_lens.metrics import MetricLike, as_loss, as_metric
from pydantic import Field
from torch import Tensor

from prisma_core import HookedModel, InputError, Result
from prisma_core.plugin import Count, Natural, Share, checked
from prisma_patch.graph import Circuit
from prisma_patch.passes import Inputs
from prisma_patch.sweeps import bar
from prisma_patch.wiring import Graph


@checked
def edge_scores(
    model: HookedModel, clean: Tensor | Inputs, corrupt: Tensor | Inputs, metric: MetricLike, *, steps: Natural = 0
) -> tuple[Result, Circuit]:
    """Return the score of every edge ``[source target]``, and the circuit of all edges with these scores.

    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> clean, corrupt = (model.preprocess(sample_scene(seed).image) for seed in (0, 3))
    >>> scores, whole = edge_scores(model, clean, corrupt, "ladybird")
    >>> whole
    Circuit(262 of 262 edges, 17 of 17 nodes)

    Args:
        model: a vision or text transformer whose heads and MLPs add to one stream.
        clean, corrupt: inputs in pairs, one corrupt for each clean; scores are the mean over pairs.
        metric: as in ``activation_patch``, with one number for each input.
        steps: 0 takes the gradient of the clean run (EAP); more integrate it over that many inputs (EAP-IG).

    Raises:
        NotApplicable: the model's stream is no sum of what heads and MLPs add to it.
        InputError: the pairs do not fit together.
    """
    graph = Graph.of(model, clean, corrupt)
    loss, shape = as_loss(model, metric), graph.shape
    change = graph.outputs(corrupt) - graph.outputs(clean)
    scores = torch.zeros(len(shape.sources), len(shape.targets), dtype=change.dtype, device=change.device)
    shares = [(step + 0.5) / steps for step in range(steps)] or [0.0]
    for share in shares:
        for layer_targets, gradient in graph.gradients(clean, share * change[0], loss).items():
            n = shape.before(layer_targets[0])
            columns = [shape.targets.index(target) for target in layer_targets]
            found = einsum(change[:n], gradient, "source batch pos d, batch pos target d -> source target")
            scores[:n, columns] += found / (len(shares) * len(clean))
    labels = {"source": shape.sources, "target": shape.targets}
    result = Result(
        scores,
        ("source", "target"),
        labels,
        technique="edge_scores",
        unit="change of the metric, to first order",
        baseline="the clean run, with the corrupt run on one edge",
        facts={"steps": steps, "pairs": len(clean)},
    )
    return result, Circuit(shape, scores.cpu(), shape.real())


@checked
def run_circuit(model: HookedModel, circuit: Circuit, clean: Tensor | Inputs, corrupt: Tensor | Inputs) -> Tensor:
    """Return the output of the clean inputs where every edge outside a circuit carries the corrupt run.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> clean, other = torch.rand(2, 1, 3, 96, 96)
    >>> circuit = find_circuit(model, clean, other, "ladybird", faithfulness=0.5, steps=1)
    >>> run_circuit(model, circuit, clean, other).shape
    torch.Size([1, 12])

    Args:
        model, clean, corrupt: as in ``edge_scores``.
        circuit: its edges carry what the pass itself makes.

    Raises:
        InputError: the circuit is of a model of another shape.
        NotApplicable: as in ``edge_scores``.
    """
    graph = Graph.of(model, clean, corrupt)
    if circuit.shape != graph.shape:
        raise InputError(f"The circuit is of {circuit.shape}; this model is {graph.shape}.")
    return graph.run(circuit, clean, graph.outputs(corrupt))


@checked
def circuit_faithfulness(
    model: HookedModel, circuit: Circuit, clean: Tensor | Inputs, corrupt: Tensor | Inputs, metric: MetricLike
) -> Result:
    """Return faithfulness and completeness of a circuit, one each: ``[measure]``, 1 being perfect.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> clean, other = torch.rand(2, 1, 3, 96, 96)
    >>> circuit = find_circuit(model, clean, other, "ladybird", faithfulness=0.5, steps=1)
    >>> circuit_faithfulness(model, circuit, clean, other, "ladybird").names("measure")
    ('faithfulness', 'completeness')

    Args:
        model, circuit, clean, corrupt: as in ``run_circuit``.
        metric: as in ``activation_patch``; its mean over pairs counts.

    Raises:
        InputError: the metric is the same for clean and corrupt inputs, or the circuit does not fit.
        NotApplicable: as in ``edge_scores``.
    """
    measure = as_metric(model, metric, single=True)
    Graph.of(model, clean, corrupt)
    with torch.no_grad():
        runs = {
            "clean": measure(model(clean)),
            "corrupt": measure(model(corrupt)),
            "circuit": measure(run_circuit(model, circuit, clean, corrupt)),
            "complement": measure(run_circuit(model, circuit.complement(), clean, corrupt)),
        }
    mean = {name: each.double().mean() for name, each in runs.items()}
    span = mean["clean"] - mean["corrupt"]
    if span.abs() <= 1e-6 * mean["clean"].abs():
        raise InputError("The metric is the same for the clean and the corrupt inputs: choose pairs that differ in it.")
    shares = [(mean[name] - mean["corrupt"]) / span for name in ("circuit", "complement")]
    return Result(
        torch.stack([shares[0], 1 - shares[1]]),
        ("measure",),
        {"measure": ("faithfulness", "completeness")},
        technique="circuit_faithfulness",
        unit="share of the metric between the corrupt and the clean run",
        tensors=runs,
        facts={"edges": len(circuit.edges), "of": int(circuit.shape.real().sum())},
    )


@checked
def edge_effects(
    model: HookedModel,
    edges: Annotated[Sequence[str], Field(min_length=1)],
    clean: Tensor | Inputs,
    corrupt: Tensor | Inputs,
    metric: MetricLike,
    *,
    progress: bool = False,
) -> Result:
    """Return the exact change of the metric when one edge carries the corrupt run: ``[edge]``, the mean over pairs.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> clean, other = torch.rand(2, 1, 3, 96, 96)
    >>> circuit = find_circuit(model, clean, other, "ladybird", faithfulness=0.5, steps=1)
    >>> edge_effects(model, circuit.edges[:2], clean, other, "ladybird").shape
    {'edge': 2}

    Args:
        model, clean, corrupt, metric: as in ``edge_scores``.
        edges: names, such as those of ``circuit.edges``.
        progress: show a bar; each edge is a pass.

    Raises:
        UnknownName: there is no such edge.
    """
    graph, measure = Graph.of(model, clean, corrupt), as_metric(model, metric, single=True)
    whole = Circuit(graph.shape, torch.zeros(graph.shape.real().shape), graph.shape.real())
    cut = [whole.without(edge) for edge in edges]
    theirs, values = graph.outputs(corrupt), list[Tensor]()
    with torch.no_grad():
        base = measure(model(clean)).mean()
        for circuit in bar(cut, "Edges", progress):
            values.append(measure(graph.run(circuit, clean, theirs)).mean() - base)
    return Result(
        torch.stack(values),
        ("edge",),
        {"edge": tuple(edges)},
        technique="edge_effects",
        unit="change of the metric",
        baseline="the clean run",
    )


@checked
def find_circuit(
    model: HookedModel,
    clean: Tensor | Inputs,
    corrupt: Tensor | Inputs,
    metric: MetricLike,
    *,
    faithfulness: Share = 0.9,
    steps: Count = 5,
) -> Circuit:
    """Return a small circuit that is this faithful: the edges of the largest scores, their number found by halving.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> clean, other = torch.rand(2, 1, 3, 96, 96)
    >>> len(find_circuit(model, clean, other, "ladybird", faithfulness=0.5, steps=1).edges) > 0
    True

    Args:
        model, clean, corrupt, metric, steps: as in ``edge_scores``.
        faithfulness: that the circuit must reach, and every larger number of edges that was tried.

    Raises:
        InputError: the metric is the same for clean and corrupt inputs.
        NotApplicable: as in ``edge_scores``.
    """
    _, whole = edge_scores(model, clean, corrupt, metric, steps=steps)
    low, high = 0, int(whole.kept.sum())
    while high - low > 1:
        middle = (low + high) // 2
        share = circuit_faithfulness(model, whole.top(middle), clean, corrupt, metric).values[0]
        low, high = (low, middle) if share >= faithfulness else (middle, high)
    return whole.top(high)
