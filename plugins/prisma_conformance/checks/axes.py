"""Axes that a hook map's rows name: techniques find heads, tokens and places by these names and their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from torch import Tensor

from prisma_conformance.checks.formulas import Acts
from prisma_core.plugin import Row

HEADS = ("head", "kv_head")
SQUARES = ("hook_attn_scores", "hook_pattern")
VECTORS = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z")  # of each head


def misnamed(rows: Mapping[str, Row], acts: Acts, image: Tensor) -> Iterator[str]:
    """Yield what the axes of each row should be, where they are not.

    Args:
        rows: of a hook map, by hook point.
        acts: activations of a pass.
        image: its input.
    """
    for point, row in rows.items():
        axes, (part, _, name) = row.axes.split(), point.rpartition(".")
        square = next((rows[at].axes for one in SQUARES if (at := f"{part}.{one}") in rows), "")
        for order in _orders(name, axes, square.split()):
            yield f"{point} has the axes '{row.axes}': expected {order}"
        if {"row", "column"} <= {*axes} and image.ndim >= 4:
            (height, width), sizes = image.shape[-2:], dict(zip(axes, acts[point].shape, strict=True))
            if (sizes["row"] - sizes["column"]) * (height - width) < 0:
                grid = f"{sizes['row']} rows and {sizes['column']} columns of an image of {height} x {width}"
                yield f"{point} has the axes '{row.axes}', and so {grid}: exchange them"


def _orders(name: str, axes: list[str], square: list[str]) -> Iterator[str]:
    """Yield the orders that axes lack; ``square`` has those of the attention's scores or pattern, if there are any."""
    if not axes[0].startswith("batch"):  # or ``batch_frame``, of both
        yield "'batch' first"
    if any(axis.startswith("d_") for axis in axes[:-1]):
        yield "what begins with 'd_' last"
    if {"row", "column"} & {*axes} and ("row", "column") not in pairwise(axes):
        yield "'row column'"
    heads = [at - len(axes) for at, axis in enumerate(axes) if axis in HEADS]
    if heads and axes[-1].startswith(("query", "key")) and heads != [-3]:
        yield "the heads before queries and keys"
    if heads and name in VECTORS and heads != [-2]:
        yield "the heads before the last"
    if name in SQUARES and not (axes[-2].startswith("query") and axes[-1].startswith("key")):
        yield "'query_pos key_pos' last"
    lead = square[: -3 if "head" in square else -2] if name in VECTORS else []
    if axes[: len(lead)] != lead:
        yield f"'{' '.join(lead)}' first, as scores have it"
    if name in VECTORS and "head" in square and len(axes) == len(square) and not any(axis in HEADS for axis in axes):
        yield "'head', as scores have it"


__all__ = ["misnamed"]
