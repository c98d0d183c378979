"""Models with random weights, and their images and tokens."""

from __future__ import annotations

from typing import cast

import torch
from hypothesis import strategies as st
from torch import Tensor

from prisma_conformance.randomise import randomise
from prisma_conformance.strategies.parts import SEEDS, SMALL
from prisma_core import ZooModel
from prisma_core.plugin import (
    AnySpec,
    ModelSpec,
    TextSpec,
)
from prisma_core.transformer import build


def random_model(spec: AnySpec, seed: int = 0, dtype: torch.dtype = torch.float64) -> ZooModel:
    """Build the model of a spec, every parameter and eps drawn, ready to run.

    >>> random_model(ModelSpec.plain()).training
    False
    """
    return cast("ZooModel", randomise(build(spec), torch.Generator().manual_seed(seed))).eval().to(dtype)


@st.composite
def images(draw: st.DrawFn, spec: ModelSpec, *, dtype: torch.dtype = torch.float64, any_size: bool = True) -> Tensor:
    """Batches of images ``[batch channel height width]`` that a spec takes, or of videos ``[batch frame ...]``.

    Args:
        spec: the facts; of a plugin's model too, whatever it was adapted from.
        dtype: of the pixels.
        any_size: False for the native size alone, where positions can be resized.
    """
    height, width = spec.image_size
    if any_size and spec.embed.interpolation is not None and (spec.rope is None or spec.rope.grid is not None):
        grid = draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))
        if grid is not None:
            height, width = (n * side for n, side in zip(grid, spec.embed.patch, strict=True))
    frames = () if spec.n_frames is None else (spec.n_frames,)
    shape = (draw(SMALL), *frames, spec.embed.in_channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(SEEDS)), dtype=dtype)


@st.composite
def tokens(draw: st.DrawFn, spec: TextSpec) -> Tensor:
    """Batches of texts ``[batch pos]`` that a spec takes, padding behind the text where there is one."""
    length = draw(st.integers(1, spec.n_ctx))
    special = {spec.pad_id, spec.pool.eos_id}
    plain = st.sampled_from([token for token in range(spec.n_vocab) if token not in special])
    batch = []
    for _ in range(draw(SMALL)):
        text = draw(st.lists(plain, min_size=1, max_size=length))
        if spec.pool.eos_id is not None:
            text[-1] = spec.pool.eos_id
        rest = length - len(text)
        batch.append(text + ([draw(plain)] * rest if spec.pad_id is None else [spec.pad_id] * rest))
    return torch.tensor(batch)


@st.composite
def inputs(draw: st.DrawFn, spec: AnySpec, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Inputs of a model: ``model(*inputs)``."""
    if isinstance(spec, ModelSpec):
        return (draw(images(spec, dtype=dtype)),)
    if isinstance(spec, TextSpec):
        return (draw(tokens(spec)),)
    return draw(images(spec.vision, dtype=dtype)), draw(tokens(spec.text))
