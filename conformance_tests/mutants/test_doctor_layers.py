"""Mistakes in the order and the number of blocks, of single tokens, and of one part of a fused tensor."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from prisma_conformance.subject import Subject
from torch import Tensor

from prisma_core import ModelSpec
from prisma_core.plugin import Reader

from .mistakes import Planted, assert_named, edited
from .north import CASE, HOOKS, WEIGHTS, NorthAdapter, NorthViT, apart, grid_positions


def _in_reverse() -> str:
    """The weight table, block 0 made of layer 1 and block 1 of layer 0."""
    parts = [line.partition("->") for line in WEIGHTS.strip().splitlines()]
    return "\n".join(
        f"{left.replace('{l}', str(1 - n))} -> {right.replace('{l}', str(n))}"
        for left, _, right in parts
        for n in ((0, 1) if "{l}" in left else (0,))
    )


def _values_doubled(x: Tensor) -> Tensor:
    q, k, v = apart(2)(x).chunk(3)
    return torch.cat([q, k, 2 * v])


def _without_the_last(grid: Tensor) -> Tensor:
    positions = grid_positions(grid)
    return torch.cat([positions[:-1], torch.zeros_like(positions[:1])])


@dataclass(frozen=True)
class Case(Planted):
    blocks: int = 2


PLANTED = [
    Case(
        "blocks in reverse",
        ("blocks.{l}: rows that take upstream's layers in the order [1, 0]", "and the logits"),
        weights={WEIGHTS: _in_reverse()},
    ),
    Case(
        "a block too few",
        ("The rows with {l} would take upstream's layers [1] too: the spec has too few blocks.",),
        blocks=1,
    ),
    Case(
        "values doubled",
        ("Upstream's is ours times 0.5.", "'layers.{l}.attn.qkv.{*} -> blocks.{l}.attn.qkv.{*} : {apart}'"),
        functions={"apart": _values_doubled},
    ),
    Case(
        "no position of the last patch",
        ("They differ at pos [11] alone, of 12.", "'positions -> embed.pos_embed : {positions}'"),
        functions={"positions": _without_the_last},
    ),
    Case(
        "positions of patches on the prefix",
        ("embed.pos_embed: those of the patches before those of the prefix", "and the logits"),
        functions={"positions": lambda grid: grid_positions(grid).roll(3, 0)},
    ),
]


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name.replace(" ", "-"))
def test_the_doctor_names_the_mistake_and_the_place(planted: Case) -> None:
    class Broken(NorthAdapter):
        def spec(self, upstream: Reader) -> ModelSpec:
            spec = super().spec(upstream)
            return spec.model_copy(update={"blocks": spec.blocks[: planted.blocks]})

    adapter = Broken(edited(WEIGHTS, planted.weights), HOOKS, functions=planted.functions)
    assert_named(planted, Subject(CASE, adapter, NorthViT(), seed=1))
