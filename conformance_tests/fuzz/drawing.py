"""Models with inputs and hook names, drawn together, and comparison up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from prisma_conformance.strategies import SEEDS, Kind, hook_names, inputs, random_model, specs
from torch import Tensor

from prisma_core.spec import AnySpec

ROUNDING = 1e-9


class Drawn:
    """A model, its inputs, and some of its hook names; printed as the spec, the seed and the shapes.

    Attributes:
        spec: the facts the model is built from.
        seed: of its weights.
        model: the model.
        inputs: ``model(*inputs)``.
        names: some of its hook points.
    """

    def __init__(self, spec: AnySpec, seed: int, model: Any, inputs: tuple[Tensor, ...], names: list[str]):
        self.spec = spec
        self.seed = seed
        self.model = model
        self.inputs = inputs
        self.names = names

    def __repr__(self) -> str:
        shapes = [list(x.shape) for x in self.inputs]
        return f"Drawn({self.spec!r}, seed={self.seed}, shapes={shapes}, names={self.names})"


@st.composite
def models(
    draw: st.DrawFn,
    kinds: Sequence[Kind] = ("vision", "text", "dual"),
    *,
    derived: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Drawn:
    spec, seed = draw(specs(kinds)), draw(SEEDS)
    model = random_model(spec, seed, dtype)
    return Drawn(spec, seed, model, draw(inputs(spec, dtype=dtype)), draw(hook_names(model, derived=derived)))


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors are equal to the bit, NaN at the same places."""
    return close(ours, theirs, 0.0)


def close(ours: Tensor, theirs: Tensor, bound: float = ROUNDING) -> bool:
    """Return whether two tensors differ by rounding alone, NaN and infinities at the same places."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    scale = float(theirs[theirs.isfinite()].abs().max()) if bool(theirs.isfinite().any()) else 0.0
    return torch.allclose(ours, theirs, rtol=0, atol=bound * max(1.0, scale), equal_nan=True)
