"""The graph of a transformer: nodes that write to the residual stream, and edges to what reads it.

Nodes are ``input`` (the stream before the first block), ``a{l}.h{h}`` (a head), ``m{l}`` (an MLP) and ``logits``; an
edge into a head names what it feeds, ``input->a0.h1<v>``. Names and the JSON layout are EAP-IG's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prisma_core import InputError, LoadError, Result
from prisma_core.plugin import Count, UnknownName, checked, expect, number, read_json, shown, suggest, write_text

QKV = ("q", "k", "v")
LARGEST = 1 << 16  # of a size that a file says


@dataclass(frozen=True)
class Shape:
    """The sizes that a graph depends on.

    Attributes:
        n_layers, n_heads, d_model: of the model.
        parallel: whether attention and MLP of a block read the same stream.
        mlps: the layers that have an MLP.
    """

    n_layers: int
    n_heads: int
    d_model: int
    parallel: bool
    mlps: tuple[int, ...]

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """What writes to the stream, in this order."""
        names = ["input"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names += [f"m{layer}"] if layer in self.mlps else []
        return tuple(names)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """What reads the stream, in this order."""
        names: list[str] = []
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}<{kind}>" for kind in QKV for head in range(self.n_heads)]
            names += [f"m{layer}"] if layer in self.mlps else []
        return (*names, "logits")

    def before(self, target: str) -> int:
        """Return how many sources write to the stream before a target reads it."""
        if target == "logits":
            return len(self.sources)
        layer = int(target.partition(".")[0][1:])
        first = self.sources.index(f"a{layer}.h0")
        return first + self.n_heads if target.startswith("m") and not self.parallel else first

    def real(self) -> Tensor:
        """Return which pairs are edges ``[source target]``."""
        mask = torch.zeros(len(self.sources), len(self.targets), dtype=torch.bool)
        for at, target in enumerate(self.targets):
            mask[: self.before(target), at] = True
        return mask


@dataclass(frozen=True, eq=False)
class Circuit:
    """A subgraph of a transformer, with a score for each edge of the whole.

    >>> shape = Shape(n_layers=1, n_heads=1, d_model=4, parallel=False, mlps=(0,))
    >>> whole = Circuit(shape, torch.rand(3, 5), shape.real())
    >>> whole.without("a0.h0->m0")
    Circuit(7 of 8 edges, 4 of 4 nodes)

    Attributes:
        shape: of the model.
        scores: of all edges ``[source target]``.
        kept: which edges are in the circuit ``[source target]``.
    """

    shape: Shape
    scores: Tensor
    kept: Tensor

    @property
    def edges(self) -> tuple[str, ...]:
        """The names of the edges in the circuit, the largest score first."""
        pairs = [(source, target) for source, target in self.kept.nonzero().tolist()]
        pairs.sort(key=lambda pair: -abs(float(self.scores[pair[0], pair[1]])))
        return tuple(f"{self.shape.sources[source]}->{self._target(target)}" for source, target in pairs)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes that edges of the circuit touch."""
        ends = {node.partition("<")[0] for edge in self.edges for node in edge.split("->")}
        return tuple(name for name in (*self.shape.sources, "logits") if name in ends)

    @checked
    def index(self, edge: str) -> tuple[int, int]:
        """Return the source and the target of an edge as indices.

        Raises:
            UnknownName: there is no such edge; the nearest are suggested.
        """
        source, _, target = edge.partition("->")
        if source in self.shape.sources and target in self.shape.targets:
            at = self.shape.sources.index(source), self.shape.targets.index(target)
            if at[0] < self.shape.before(target):
                return at
        every = [f"{source}->{target}" for target in self.shape.targets for source in self._sources_of(target)]
        raise UnknownName(f"No edge {edge!r} among the {len(every)} of this model.{suggest(edge, every)}")

    @checked
    def top(self, n_edges: Count) -> Circuit:
        """Return the circuit of the edges with the largest scores by size, pruned of those that lead nowhere."""
        real = self.shape.real()
        if not 1 <= n_edges <= int(real.sum()):
            raise InputError(f"Expected n_edges from 1 to {int(real.sum())}, got {n_edges}.")
        sizes = self.scores.abs().masked_fill(~real, -1.0).flatten()
        kept = torch.zeros_like(real).flatten()
        kept[sizes.topk(n_edges).indices] = True
        return replace(self, kept=kept.view(real.shape)).pruned()

    @checked
    def only(self, edges: Sequence[str]) -> Circuit:
        """Return the circuit of these edges."""
        kept = torch.zeros_like(self.kept)
        for edge in edges:
            kept[self.index(edge)] = True
        return replace(self, kept=kept)

    @checked
    def without(self, *edges: str) -> Circuit:
        """Return the circuit without these edges."""
        kept = self.kept.clone()
        for edge in edges:
            kept[self.index(edge)] = False
        return replace(self, kept=kept)

    def complement(self) -> Circuit:
        """Return the circuit of all other edges."""
        return replace(self, kept=self.shape.real() & ~self.kept)

    def pruned(self) -> Circuit:
        """Return the circuit without edges from nodes that nothing reaches, and to nodes that reach nothing."""
        kept, nodes = self.kept.clone(), [target.partition("<")[0] for target in self.shape.targets]
        while True:
            reached = {nodes[at] for at in kept.any(0).nonzero().flatten().tolist()} | {"input"}
            leading = {self.shape.sources[at] for at in kept.any(1).nonzero().flatten().tolist()} | {"logits"}
            rows = torch.tensor([source in reached for source in self.shape.sources])
            columns = torch.tensor([node in leading for node in nodes])
            fewer = kept & rows[:, None] & columns
            if torch.equal(fewer, kept):
                return replace(self, kept=kept)
            kept = fewer

    def to_result(self) -> Result:
        """Return the scores of the circuit's edges ``[source target]``, 0 for all others."""
        scores = torch.where(self.kept, self.scores, torch.zeros_like(self.scores))
        labels = {"source": self.shape.sources, "target": self.shape.targets}
        return Result(scores, ("source", "target"), labels, technique="circuit", unit="score")

    def plot(self, **options: Any) -> Any:
        """Return a Plotly figure of the graph; ``options`` are those of ``Result.plot``.

        Raises:
            PluginError: the library that draws is not installed.
        """
        return self.to_result().plot(**options)

    def _repr_html_(self) -> str:
        return self.to_result()._repr_html_()

    @checked
    def save(self, path: str | Path) -> Path:
        """Write the circuit as JSON in EAP-IG's layout; ``Circuit.load`` reads it, and so does EAP-IG's own class."""
        path, inside, shape = Path(path), set(self.nodes), self.shape
        cfg = {
            "n_layers": shape.n_layers,
            "n_heads": shape.n_heads,
            "d_model": shape.d_model,
            "parallel_attn_mlp": shape.parallel,
        }
        nodes = {name: {"in_graph": name == "logits" or name in inside} for name in (*shape.sources, "logits")}
        edges = {
            f"{source}->{target}": {
                "score": float(self.scores[row, column]),
                "in_graph": bool(self.kept[row, column]),
            }
            for column, target in enumerate(shape.targets)
            for row, source in enumerate(self._sources_of(target))
        }
        write_text(path, json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges}))
        return path

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Circuit:
        """Read a circuit in EAP-IG's JSON layout; scores of neurons, which it may have, are left out.

        Raises:
            LoadError: the file is no such circuit; it says what is missing.
        """
        path = Path(path)
        try:
            data = read_json(path)
            cfg, nodes, edges = (data[key] for key in ("cfg", "nodes", "edges"))
            layers, heads, d_model = (number(cfg[key], key, 1, LARGEST) for key in ("n_layers", "n_heads", "d_model"))
            if layers * heads > len(nodes):  # before anything is made of a count
                raise InputError(f"{layers} layers of {heads} heads, and {len(nodes)} nodes")
            mlps = tuple(layer for layer in range(layers) if f"m{layer}" in nodes)
            parallel = expect(cfg["parallel_attn_mlp"], bool, "parallel_attn_mlp as true or false")
            shape = Shape(layers, heads, d_model, parallel=parallel, mlps=mlps)
            circuit = cls(shape, torch.zeros(shape.real().shape), torch.zeros_like(shape.real()))
            for name, edge in edges.items():
                at = circuit.index(name)
                circuit.scores[at] = _number(edge)
                circuit.kept[at] = expect(edge["in_graph"], bool, f"in_graph of {name} as true or false")
            if len(edges) != int(shape.real().sum()):
                raise InputError(f"{int(shape.real().sum())} edges by its sizes, and {len(edges)} in the file")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, UnknownName, InputError) as error:
            raise LoadError(
                f"{path} holds no circuit in EAP-IG's layout ({str(error)[:200]}): expected JSON with cfg "
                "(n_layers, n_heads, d_model, parallel_attn_mlp), nodes and edges {name: {score, in_graph}}."
            ) from error
        return circuit

    def _sources_of(self, target: str) -> tuple[str, ...]:
        return self.shape.sources[: self.shape.before(target)]

    def _target(self, at: int) -> str:
        return self.shape.targets[at]

    def __repr__(self) -> str:
        n, of = int(self.kept.sum()), int(self.shape.real().sum())
        return f"Circuit({n} of {of} edges, {len(self.nodes)} of {len(self.shape.sources) + 1} nodes)"


def _number(edge: Mapping[str, Any]) -> float:
    score = edge["score"]
    if type(score) not in (int, float, type(None)):
        raise InputError(f"Expected a score as a number, got {shown(score)}.")
    return float("nan") if score is None else float(score)
