"""Graphs of what writes to a residual stream and what reads it: where nodes stand, and which edges are drawn.

A chart of kind ``graph`` holds a weight for each pair ``[source target]``, NaN where there is no edge. Nodes are named
as ``prisma_patch`` names them: ``input``, ``a0.h1`` (a head; ``a0.h1<v>`` is what its values read), ``m0`` (an MLP),
``logits``. The input stands below, each layer above the one before, heads from left to right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from prisma_core import InputError
from prisma_view.chart import Chart

NODE = re.compile(r"(?P<kind>[am])(?P<layer>\d+)(?:\.h(?P<head>\d+))?")
PORTS = {"q": -0.07, "k": 0.0, "v": 0.07}
"""Where edges end at a head, by what they feed, from the middle of its node."""
THIN, THICK = 0.6, 6.0


@dataclass(frozen=True)
class Edge:
    """An edge: its name, weight, width (in pixels) and ends ``(x, y)``."""

    name: str
    weight: float
    width: float
    start: tuple[float, float]
    end: tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    """Places of nodes by name, in units of a node's distance to the next, and edges, the weakest first."""

    nodes: dict[str, tuple[float, float]]
    edges: tuple[Edge, ...]

    @property
    def levels(self) -> int:
        return 1 + round(max(y for _, y in self.nodes.values()))


def drawing(chart: Chart) -> Drawing:
    """Return what is drawn of a chart of kind ``graph``.

    Raises:
        InputError: a name that is no node's.
    """
    sources, targets = chart.labels
    weights = chart.values[0]
    pairs = np.argwhere(~np.isnan(weights))
    order = np.argsort(np.abs(weights[tuple(pairs.T)]), kind="stable")
    names = (*sources, *(target.partition("<")[0] for target in targets))
    places = _places(dict.fromkeys(names))
    most = float(np.nanmax(np.abs(weights), initial=0.0)) or 1.0
    edges = []
    for row, column in pairs[order]:
        source, target, weight = sources[row], targets[column], float(weights[row, column])
        node, _, port = target.partition("<")
        x, y = places[node]
        width = THIN + (THICK - THIN) * abs(weight) / most
        end = (x + PORTS.get(port.rstrip(">"), 0.0), y)
        edges.append(Edge(f"{source}->{target}", weight, width, places[source], end))
    return Drawing(places, tuple(edges))


def _places(names: Iterable[str]) -> dict[str, tuple[float, float]]:
    rows: dict[tuple[int, int], list[str]] = {}
    for name in names:
        rows.setdefault(_level(name), []).append(name)
    widest = max(map(len, rows.values()))
    return {
        name: ((at + 0.5) * widest / len(row), float(level))
        for level, key in enumerate(sorted(rows))
        for row in [rows[key]]
        for at, name in enumerate(row)
    }


def _level(name: str) -> tuple[int, int]:
    """Return the layer of a node, and its place in it: heads before the MLP."""
    match = NODE.fullmatch(name)
    if match:
        return int(match["layer"]), int(match["kind"] == "m")
    if name not in ("input", "logits"):
        raise InputError(f"{name!r} is no node of a graph: expected input, a0.h1, m0 or logits.")
    return (-1, 0) if name == "input" else (10**6, 0)
