"""Composition scores: how much of what a head writes a later head reads as queries, keys or values.

Equation:
    score = |W_OV M| / (|W_OV| |M|), M the later head's W_QK (Q), its transpose (K) or W_OV (V); Frobenius norms. The
    baseline is the same with a random rotation of the stream between the two heads.
Cost:
    No pass: weights alone; the products of all pairs of heads.
Misleads:
    Weights say what could be read, not what is: path patching says what is. Norms and layer scales are left out: fold
    them first (``prisma_core.fold_layer_norm``). Scores of few dimensions are large by chance: compare the baseline.
Source:
    Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
"""

from __future__ import annotations

from typing import Literal

import torch

from prisma_core import HookedModel, Result
from prisma_core.plugin import Seed, checked
from prisma_lens.readouts import TowerName, tower_of


@checked
@torch.no_grad()
def composition(
    model: HookedModel, mode: Literal["Q", "K", "V"] = "V", *, tower: TowerName = "vision", seed: Seed = 0
) -> Result:
    """Return how much of what each head writes each later head reads: ``[layer head later_layer later_head]``.

    >>> import prisma_core as prisma
    >>> composition(prisma.load("toy:scenes-3l"), "K").shape
    {'layer': 3, 'head': 4, 'later_layer': 3, 'later_head': 4}

    Args:
        model: a canonical transformer, or a dual encoder.
        mode: what the later head makes of it: queries, keys or values.
        tower: of a dual encoder, which.
        seed: of the baseline's rotation.

    Returns:
        The scores, 0 where the second head is in no later layer; ``tensors["baseline"]``: those of the rotated stream.

    Raises:
        InputError: no such mode.
        NotApplicable: the model has no canonical form, or its layers differ in their sizes.
    """
    own = tower_of(model, tower)
    scores = own.all_composition_scores(mode)
    width = own.spec.d_model
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = torch.linalg.qr(noise).Q.to(scores.device)
    layers, heads = (tuple(f"{letter}{at}" for at in range(n)) for letter, n in zip("LH", scores.shape, strict=False))
    return Result(
        scores,
        ("layer", "head", "later_layer", "later_head"),
        {"layer": layers, "head": heads, "later_layer": layers, "later_head": heads},
        technique="composition",
        unit=f"{mode}-composition",
        baseline="a random rotation of the stream between the heads (tensors['baseline'])",
        tensors={"baseline": own.all_composition_scores(mode, rotation=rotation)},
        facts={"mode": mode},
    )
