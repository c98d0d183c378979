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

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from prisma_lens.metrics import MetricLike, as_metric
from torch import Tensor

from prisma_core import HookedModel, InputError, NotApplicable, Result, TokenLayout
from prisma_core.plugin import Query, layer_of, positions_of
from prisma_patch.sweep import Inputs, Variant, sweep

Positions: TypeAlias = "int | slice | Sequence[int] | str | None"
Region: TypeAlias = "tuple[int | slice, int | slice] | None"
Other: TypeAlias = "Tensor | tuple[Tensor, ...] | Literal['zero', 'mean', 'resample']"
SHORT = {"neuron": "d_mlp", "position": "pos"}


def activation_patch(
    model: HookedModel,
    clean: Tensor | Inputs,
    other: Other,
    metric: MetricLike,
    *,
    at: Query = "z",
    over: str | Sequence[str] = ("layer", "head"),
    pos: Positions = None,
    heads: int | Sequence[int] | None = None,
    region: Region = None,
    reference: Tensor | Inputs | None = None,
    batch_size: int = 64,
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
        reference: inputs of the mean; by default ``clean``.
        batch_size: how many images to run at once.
        progress: show a bar; None shows one for long sweeps on a terminal.
        resume: a file that keeps the effects so far; a sweep that was stopped goes on from it.

    Raises:
        UnknownName: a hook point, class or subset that does not exist.
        InputError: the runs do not fit together, or an activation has no such axis.
        NotApplicable: the hook points have parts of different number, or the patch cannot reach the output.
    """
    inputs = as_inputs(clean)
    measure = as_metric(model, metric)
    axes = [SHORT.get(name, name) for name in (over.split() if isinstance(over, str) else over)]
    names = model.resolve(at)
    if "layer" in axes:
        outside, names = names[0], [name for name in names if layer_of(name) is not None]
        if not names:
            raise InputError(f"{outside} is in no layer: leave 'layer' out of over=, and ask for one hook point.")
    if "layer" not in axes and len(names) > 1:
        raise InputError(f"at={at!r} is {len(names)} hook points: put 'layer' into over=, or ask for one.")
    layout = model.layout_for(*inputs)
    places = _Places(model, names, axes, layout, pos, heads, region)
    check_reach(model, names, places)
    with torch.no_grad():
        base = measure(model(*inputs))
        _, shapes = model.run_with_cache(*(each[:1] for each in inputs), names=names, output=False)
    sources = _sources(model, inputs, other, reference, names)
    parts = {name: places.parts(name, shapes[name].shape) for name in names}
    counts = {name: [len(rows) for rows in rows_of] for name, rows_of in parts.items()}
    if len({tuple(each) for each in counts.values()}) != 1:
        each = ", ".join(f"{name} has {' x '.join(map(str, count))}" for name, count in counts.items())
        raise NotApplicable(f"The places differ between hook points ({each}), so there is no one sweep over them.")
    variants = [
        Variant(name, places.index(name, chosen), sources.get(name))
        for name in names
        for chosen in product(*parts[name])
    ]
    effects = sweep(model, inputs, variants, measure, batch_size=batch_size, progress=progress, resume=resume)
    values, blocks = effects - base, list(dict.fromkeys(_block(name) for name in names))
    if not axes:
        values = values[0]
    elif "layer" in axes:
        values = _by_layer(values, names, blocks, counts[names[0]], places.swept)
        values = values.movedim(0, axes.index("layer"))
    else:
        values = values.unflatten(0, counts[names[0]])
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


def patch_heads(model: HookedModel, clean: Tensor | Inputs, other: Other, metric: MetricLike, **options: Any) -> Result:
    """Return how far the metric moves when each head's output is replaced: ``[layer head batch]``.

    Args:
        model, clean, other, metric, options: as in ``activation_patch``.
    """
    return activation_patch(model, clean, other, metric, at="z", over=("layer", "head"), **options)


def as_inputs(given: Tensor | Inputs) -> Inputs:
    """Return a model's inputs as a tuple."""
    return (given,) if isinstance(given, Tensor) else tuple(given)


def token_positions(layout: TokenLayout | None, pos: Positions) -> list[int] | None:
    """Return the token positions that are meant, or None for all.

    Raises:
        InputError: a subset is named and the model has no token layout.
    """
    if pos is None:
        return None
    if isinstance(pos, str):
        if layout is None:
            raise InputError(f"This model has no token layout, so pos={pos!r} means nothing; give positions.")
        chosen = list(range(layout.n_tokens))[layout.slice(pos)]
        if not chosen:
            raise InputError(f"This model has no {pos} tokens; its tokens are {layout!r}.")
        return chosen
    if isinstance(pos, slice):
        if layout is None:
            raise InputError("A slice of positions needs the number of tokens, which this model does not know.")
        return list(range(layout.n_tokens))[pos]
    return [pos] if isinstance(pos, int) else list(pos)


def check_reach(model: HookedModel, names: Sequence[str], places: _Places) -> None:
    """Refuse a patch that cannot move the output: behind the last attention, at tokens that nothing reads.

    Raises:
        NotApplicable: with what the model reads.
    """
    spec = getattr(model, "spec", None)
    pool = getattr(spec, "pool", None)
    if pool is None or getattr(spec, "layout", None) is None or getattr(pool, "kind", "") != "token":
        return
    if places.tokens is None or 0 in places.tokens:
        return
    last = len(spec.blocks) - 1
    late = ("hook_resid_post", "hook_resid_mid", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post")
    if all(layer_of(name) == last and name.endswith((*late, "mlp.hook_pre")) for name in names):
        raise NotApplicable(
            f"This model reads its class token alone, and {names[0]} at other tokens no longer reaches it: patch an "
            "earlier layer, or pos='cls'."
        )


class _Places:
    """Parts of each activation that a sweep replaces."""

    def __init__(
        self,
        model: HookedModel,
        names: Sequence[str],
        axes: Sequence[str],
        layout: TokenLayout | None,
        pos: Positions,
        heads: int | Sequence[int] | None,
        region: Region,
    ):
        points = model.hook_points()
        self.axes = {name: points[name].axes.split() for name in names}
        self.swept = [axis for axis in axes if axis != "layer"]
        self.layout, self.region = layout, region
        self.tokens = token_positions(layout, pos)
        self.heads = None if heads is None else [heads] if isinstance(heads, int) else list(heads)
        for name in names:
            self._check(name, pos)

    def _check(self, name: str, pos: Positions) -> None:
        own, said = set(self.axes[name]), " ".join(self.axes[name])
        grid = {"row", "column"} <= own
        for axis in self.swept:
            if self._own(name, axis) is None:
                raise InputError(f"{name} ({said}) has no axis {axis!r} to sweep over.")
        if pos is not None and not {"pos", "query_pos"} & own:
            instead = "give region=(rows, columns) instead" if grid else "leave pos out"
            raise InputError(f"{name} ({said}) has no positions to choose from; {instead}.")
        if self.heads is not None and "head" not in own:
            raise InputError(f"{name} ({said}) has no axis 'head', so there are no heads to choose.")
        if self.region is None:
            return
        given: object = self.region
        if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(each, int | slice) for each in given)):
            raise InputError(f"Expected region=(rows, columns), each a number or a slice, got {given!r}.")
        if not grid:
            instead = "give pos= instead" if {"pos", "query_pos"} & own else "leave region out"
            raise InputError(f"{name} ({said}) has no rows and columns to choose from; {instead}.")

    def _own(self, name: str, axis: str) -> str | None:
        """The axis of an activation that is meant: the queries' where tokens have two."""
        own = self.axes[name]
        return axis if axis in own else "query_pos" if axis == "pos" and "query_pos" in own else None

    def _chosen(self, name: str, axis: str, size: int) -> list[int]:
        given = self.tokens if axis in ("pos", "query_pos") else self.heads if axis == "head" else None
        return list(range(size)) if given is None else positions_of(given, size)

    def parts(self, name: str, shape: Sequence[int]) -> list[list[int]]:
        """Return the places along each swept axis of an activation."""
        sizes = dict(zip(self.axes[name], shape, strict=True))
        own = [str(self._own(name, axis)) for axis in self.swept]
        return [self._chosen(name, axis, sizes[axis]) for axis in own]

    def index(self, name: str, chosen: Sequence[int]) -> tuple[Any, ...]:
        """Return the index into an activation of one variant."""
        fixed: dict[str, Any] = dict(zip((str(self._own(name, axis)) for axis in self.swept), chosen, strict=True))
        row, column = self.region or (None, None)
        whole = {"pos": self.tokens, "query_pos": self.tokens, "head": self.heads, "row": row, "column": column}
        index = [fixed.get(axis, whole.get(axis)) for axis in self.axes[name]]
        lists = [at for at, each in enumerate(index) if isinstance(each, list)]
        if len(lists) > 1:  # several lists choose a grid of places, not pairs
            grids = torch.meshgrid(*(torch.tensor(index[at]) for at in lists), indexing="ij")
            for at, grid in zip(lists, grids, strict=True):
                index[at] = grid
        return tuple(slice(None) if each is None else each for each in index)

    def labels(self, names: Sequence[str], shapes: Any, n_heads: int) -> dict[str, tuple[str, ...]]:
        """Return a label for each place of each swept axis."""
        first, blocks = names[0], list(dict.fromkeys(_block(name) for name in names))
        plain = all(block.startswith("blocks.") for block in blocks)
        found = {"layer": tuple(f"L{block.removeprefix('blocks.')}" if plain else block for block in blocks)}
        for axis, chosen in zip(self.swept, self.parts(first, shapes[first].shape), strict=True):
            tokens = self.layout.token_names() if self.layout is not None else []
            own = self._own(first, axis)
            if (
                own in ("pos", "query_pos", "key_pos")
                and len(tokens) == shapes[first].shape[self.axes[first].index(own)]
            ):
                found[axis] = tuple(tokens[each] for each in chosen)
            else:
                every = chosen if axis != "head" or len(chosen) == n_heads else range(n_heads)
                found[axis] = tuple(f"H{each}" if axis == "head" else str(each) for each in every)
        return found


def _sources(
    model: HookedModel, inputs: Inputs, other: Other, reference: Tensor | Inputs | None, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the activations to put in, by name; none for zeros."""
    if isinstance(other, str):
        if other not in ("zero", "mean", "resample"):
            raise InputError(f"Expected other images, 'zero', 'mean' or 'resample', got {other!r}.")
        if other == "zero":
            return {}
        given = as_inputs(reference) if reference is not None else inputs
        with torch.no_grad():
            _, cache = model.run_with_cache(*given, names=list(names), output=False)
        if other == "mean":
            return {name: x.mean(0, keepdim=True) for name, x in cache.items()}
        n = inputs[0].shape[0]
        if reference is None and n < 2:
            raise InputError(
                "Resampling takes activations of other images of the batch: give two or more, or reference=."
            )
        rows = [(at + 1) % given[0].shape[0] for at in range(n)]
        return {name: x[rows] for name, x in cache.items()}
    theirs = as_inputs(other)
    if theirs[0].shape[0] not in (1, inputs[0].shape[0]):
        raise InputError(
            f"{inputs[0].shape[0]} images against {theirs[0].shape[0]}: give as many, or one for all. For their mean "
            "give other='mean', reference=images."
        )
    with torch.no_grad():
        _, cache = model.run_with_cache(*theirs, names=list(names), output=False)
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
        raise NotApplicable(f"{_block(names[0])} has several of these hook points ({names[0]}, {names[1]}): name one.")
    at = 2 + swept.index("head")
    values = values.unflatten(0, [len(blocks), sides]).movedim(1, at - 1)
    return values.flatten(at - 1, at)


def _block(name: str) -> str:
    """``stages.1.blocks.0.attn.hook_z`` is of ``stages.1.blocks.0``."""
    before, _, rest = f".{name}".rpartition(".blocks.")
    return f"{before}.blocks.{rest.partition('.')[0]}".removeprefix(".")


def _said(at: object) -> str:
    return at if isinstance(at, str) else repr(at)
