"""Activation patching: put activations of one run into another, and see how far a metric moves.

Equation:
    effect[p] = metric(model(clean; a[p] <- b[p])) - metric(model(clean)), a the activation of the clean run, b of the
    other, p each place of the sweep.
Cost:
    One pass for each place, batched, from the patched layer on. Attribution patching (``attribution_patch``) takes two
    passes in all and is an approximation.
Misleads:
    A replaced activation may be one that no image has. Noising (the clean run is edited) finds what is necessary,
    denoising (swap the two) what is sufficient; they differ where parts back each other up. On a model that reads the
    mean of all tokens the class token alone does next to nothing.
Source:
    Vig et al. 2020; Meng et al. 2022; Zhang and Nanda, "Towards Best Practices of Activation Patching" (2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from prisma_lens.inputs import as_inputs, points_of
from prisma_lens.metrics import MetricLike, as_metric
from torch import Tensor

from prisma_core import HookedModel, InputError, NotApplicable, Result
from prisma_core.plugin import Count, Indices, Query, checked, layer_of, shown
from prisma_patch.passes import Inputs, Variant, passes_of
from prisma_patch.places import Places, Positions, Region, block_of, check_layers_swept, check_reach, layout_at
from prisma_patch.sweeps import run

Other: TypeAlias = Tensor | tuple[Tensor, ...] | Literal["zero", "mean", "resample"]
SHORT = {"neuron": "d_mlp", "position": "pos"}


@checked
def activation_patch(
    model: HookedModel,
    clean: Tensor | Inputs,
    other: Other,
    metric: MetricLike,
    *,
    at: Query = "z",
    over: str | Sequence[str] = ("layer", "head"),
    pos: Positions = None,
    heads: int | Indices | None = None,
    region: Region = None,
    reference: Tensor | Inputs | None = None,
    batch_size: Count = 64,
    progress: bool | None = None,
    resume: str | Path | None = None,
) -> Result:
    """Return how far the metric moves when each place of a sweep is replaced: ``[*over batch]``.

    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> image, other = (model.preprocess(sample_scene(seed).image) for seed in (0, 3))
    >>> activation_patch(model, image, other, "ladybird", at="z", over="layer head").shape
    {'layer': 3, 'head': 4, 'batch': 1}

    Args:
        model: the model to run.
        clean: the inputs whose run is edited: ``[batch channel height width]``; a tuple for a model of several.
        other: inputs whose activations are put in, as many as ``clean`` or one for all; or ``"zero"``, ``"mean"`` (over
            ``reference``), or ``"resample"`` (each from another input of the batch).
        metric: a function of the output, a class, or two (see ``as_metric``).
        at: hook points, each patched by itself (see ``prisma_core.hooks.query``).
        over: the axes of the sweep, as names or in one text: ``layer`` (one hook point each), and axes of the
            activation such as ``head``, ``pos``, ``neuron``, ``query_pos``. What is not named is replaced as a whole.
        pos: token positions to replace or to sweep over, or a subset of the layout (``"cls"``, ``"patches"``); None for
            all. Of patterns and scores they are the queries'.
        heads: heads to replace or to sweep over; None for all.
        region: rows and columns to replace, each one or a slice, where the stream has axes ``row column``.
        reference: inputs of ``"mean"`` and ``"resample"``; by default ``clean``, of two or more.
        batch_size: how many images to run at once.
        progress: show a bar; None shows one for long sweeps on a terminal.
        resume: a file that keeps the effects so far; a sweep that was stopped goes on from it.

    Raises:
        UnknownName: a hook point, class or subset that does not exist.
        InputError: the runs do not fit together, or an activation has no such axis.
        NotApplicable: the hook points have parts of different number, or the patch cannot reach the output.
    """
    inputs, others = as_inputs(model, clean), other if isinstance(other, str) else as_inputs(model, other)
    measure, (axes, names) = as_metric(model, metric), sweep_of(model, at, over)
    layout = layout_at(model, names, *inputs)
    places = Places(model, names, axes, layout, pos, heads, region)
    check_reach(model, names, places)
    sources = _sources(model, inputs, others, reference, names)
    with torch.no_grad():
        passes = passes_of(model, inputs)
        base = measure(passes.clean())
        shapes: Mapping[str, Tensor] = sources
        if isinstance(others, str) or layout is None or model.layout_for(*others) != layout:
            _, shapes = model.run_with_cache(*(each[:1] for each in inputs), names=names, output=False)
    counts, variants = places.counts(names, shapes), variants_of(places, names, shapes, sources)
    effects = run(passes, variants, measure, batch_size=batch_size, progress=progress, resume=resume)
    values = arranged(effects - base, names, axes, counts, places.swept)
    labels = places.labels(names, shapes, values.shape[axes.index("head")] if "head" in axes else 0)
    rest = ("batch", *(f"metric{i}" for i in range(values.ndim - len(axes) - 1)))
    return Result(
        values,
        (*axes, *rest),
        {axis: labels[axis] for axis in axes if axis in labels},
        technique="activation_patch",
        unit="change of the metric",
        baseline=f"the clean run, with {other if isinstance(other, str) else 'the other run'} put in at {_said(at)}",
        tensors={"clean": base},
    )


def sweep_of(model: HookedModel, at: Query, over: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the axes of a sweep by their full names, and its hook points: those in layers where layers are swept.

    Raises:
        UnknownName: no such hook point.
        InputError: layers and hook points do not fit together.
    """
    axes = [SHORT.get(name, name) for name in (over.split() if isinstance(over, str) else over)]
    names = points_of(model, at)
    if "layer" in axes:
        outside, names = names[0], [name for name in names if layer_of(name) is not None]
        if not names:
            raise InputError(f"{outside} is in no layer: leave 'layer' out of over=, and ask for one hook point.")
    check_layers_swept(at, names, axes, over)
    return axes, names


def variants_of(
    places: Places, names: Sequence[str], shapes: Mapping[str, Tensor], sources: Mapping[str, Tensor]
) -> list[Variant]:
    """Return a variant for each place, hook point by hook point.

    Args:
        places: of the sweep.
        names: its hook points.
        shapes: the activations of the clean run, or ones of their shapes.
        sources: what is put in; zeros where there is none.
    """
    return [
        Variant(name, places.index(name, chosen), sources.get(name))
        for name in names
        for chosen in product(*places.parts(name, shapes[name].shape))
    ]


def arranged(
    values: Tensor, names: Sequence[str], axes: Sequence[str], counts: Sequence[int], within: Sequence[str]
) -> Tensor:
    """Return ``[variant ...]``, in the order of ``variants_of``, as ``[*axes ...]``.

    Args:
        values: one row for each variant.
        names, axes: hook points and axes of the sweep.
        counts: how many places there are along each of the axes of an activation.
        within: these axes.

    Raises:
        NotApplicable: a layer has several of these hook points and no heads, or layers have different numbers.
    """
    if not axes:
        return values[0]
    if "layer" not in axes:
        return values.unflatten(0, counts)
    blocks = list(dict.fromkeys(block_of(name) for name in names))
    return _by_layer(values, names, blocks, counts, within).movedim(0, axes.index("layer"))


@checked
def patch_heads(model: HookedModel, clean: Tensor | Inputs, other: Other, metric: MetricLike, **options: Any) -> Result:
    """Return how far the metric moves when each head's output is replaced: ``[layer head batch]``.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> clean, other = torch.rand(2, 1, 3, 96, 96)
    >>> patch_heads(model, clean, other, "ladybird").shape
    {'layer': 3, 'head': 4, 'batch': 1}

    Args:
        model, clean, other, metric, options: as in ``activation_patch``.
    """
    return activation_patch(model, clean, other, metric, at="z", over=("layer", "head"), **options)


def _sources(
    model: HookedModel, inputs: Inputs, other: str | Inputs, reference: Tensor | Inputs | None, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the activations to put in, by name; none for zeros."""
    if isinstance(other, str):
        if other not in ("zero", "mean", "resample"):
            raise InputError(f"Expected other images, 'zero', 'mean' or 'resample', got {other!r}.")
        if other == "zero":
            return {}
        n = inputs[0].shape[0]
        if reference is None and n < 2:
            raise InputError(
                f"other={other!r} takes the activations of the batch, and one image would get its own back: give two "
                "or more, or reference=images."
            )
        sources = as_inputs(model, reference) if reference is not None else inputs
        with torch.no_grad():
            _, cache = model.run_with_cache(*sources, names=list(names), output=False)
        if other == "mean":
            return {name: x.mean(0, keepdim=True) for name, x in cache.items()}
        rows = [(at + 1) % sources[0].shape[0] for at in range(n)]
        return {name: x[rows] for name, x in cache.items()}
    if reference is not None:
        raise InputError(f"reference= is for other='mean' or 'resample'; got other inputs and {shown(reference)}.")
    if other[0].shape[0] not in (1, inputs[0].shape[0]):
        raise InputError(
            f"{inputs[0].shape[0]} images against {other[0].shape[0]}: give as many, or one for all. For their mean "
            "give other='mean', reference=images."
        )
    with torch.no_grad():
        _, cache = model.run_with_cache(*other, names=list(names), output=False)
    return dict(cache)


def _by_layer(
    values: Tensor, names: Sequence[str], blocks: Sequence[str], counts: Sequence[int], swept: Sequence[str]
) -> Tensor:
    """Return ``[variant ...]`` as ``[layer *counts ...]``; heads of attentions side by side follow each other.

    Raises:
        NotApplicable: a layer has several of these hook points and no heads, or layers have different numbers.
    """
    values = values.unflatten(0, [len(names), *counts])
    sides = len(names) // len(blocks)
    if sides == 1:
        return values
    if "head" not in swept or len(names) != sides * len(blocks):
        raise NotApplicable(
            f"{block_of(names[0])} has several of these hook points ({names[0]}, {names[1]}): name one."
        )
    at = 2 + swept.index("head")
    values = values.unflatten(0, [len(blocks), sides]).movedim(1, at - 1)
    return values.flatten(at - 1, at)


def _said(at: object) -> str:
    return at if isinstance(at, str) else repr(at)
