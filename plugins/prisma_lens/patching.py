"""Activation patching: put activations of one run into another, and see what it does to a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TypeAlias

import torch
from rich.progress import track
from torch import Tensor

from prisma_core import HookContext, HookedModel, HookedViT, InputError
from prisma_core.hooks.query import Query, layer_of

Metric: TypeAlias = Callable[[Tensor], Tensor]
Positions: TypeAlias = "int | slice | Sequence[int] | None"
Region: TypeAlias = "tuple[int | slice, int | slice] | None"


def logit_difference(higher: int, lower: int) -> Metric:
    """Return the metric ``logits[higher] - logits[lower]``: ``[batch class] -> [batch]``."""
    return lambda logits: logits[:, higher] - logits[:, lower]


def activation_patch(
    model: HookedModel,
    clean: Tensor,
    other: Tensor | None,
    names: Query,
    metric: Metric,
    *,
    pos: Positions = None,
    region: Region = None,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Return the metric of the clean run with one activation after the other replaced: ``{name: [batch]}``.

    Args:
        model: what to run.
        clean: the image whose run is edited: ``[batch channel height width]``.
        other: the image whose activations are put in, as many as ``clean`` or one for all; None puts in zeros.
        names: which activations, one at a time (see ``prisma_core.hooks.query``).
        metric: of logits ``[batch class]``, one number each ``[batch]`` or several ``[batch ...]``.
        pos: token positions to replace; None for all. Axes ``window query_pos`` count within each window.
        region: rows and columns to replace, each one or a slice, where the stream has axes ``row column``.
        batch_size: how many images to run at once.
        progress: show a bar.

    Raises:
        UnknownName: a name matches no hook point.
        InputError: the two runs do not fit together, an activation has no axis to choose from, or the metric is no
            function.
    """
    _check_metric(metric, "activation_patch(model, clean, other, names, metric)")
    wanted = model.resolve(names)
    points = model.hook_points()
    for name in wanted:
        _check_places(name, points[name].axes, pos, region)
    source = _source(model, other, wanted)
    patches = [_Patch(name, _part(points[name].axes, pos, region=region), source.get(name)) for name in wanted]
    effects = _run(model, clean, patches, metric, batch_size, progress)
    return dict(zip(wanted, effects, strict=True))


def patch_heads(
    model: HookedModel,
    clean: Tensor,
    other: Tensor | None,
    metric: Metric,
    *,
    pos: Positions = None,
    batch_size: int = 32,
    progress: bool = False,
) -> Tensor:
    """Return what each head's output does: ``metric(patched) - metric(clean)``, as ``[layer head batch]``.

    Args:
        model: what to run.
        clean: the image whose run is edited: ``[batch channel height width]``.
        other: where the heads' outputs ``hook_z`` are taken from: one image, as many as ``clean``, or another number
            of images, whose mean is put in (mean ablation). None puts in zeros (zero ablation).
        metric: of logits ``[batch class]``, one number each ``[batch]`` or several ``[batch ...]``.
        pos: token positions to replace, such as 0 for the class token; None for all.
        batch_size: how many images to run at once.
        progress: show a bar.

    Raises:
        InputError: the two runs do not fit together, the layers differ in their number of heads, or the metric is no
            function.
    """
    _check_metric(metric, "patch_heads(model, clean, other, metric)")
    names = [name for name in model.resolve("hook_z") if layer_of(name) is not None]
    points = model.hook_points()
    axes = {name: points[name].axes.split() for name in names}
    if without := next((name for name in names if "head" not in axes[name]), None):
        raise InputError(f"{without} ({points[without].axes}) has no axis 'head', so there are no heads to patch.")
    _, shapes = model.run_with_cache(clean[:1], names=names, output=False)
    heads = [(name, head) for name in names for head in range(shapes[name].shape[axes[name].index("head")])]
    counts = Counter(_block(name) for name, _ in heads)
    if len(set(counts.values())) != 1:
        each = ", ".join(f"{block} has {n}" for block, n in counts.items())
        raise InputError(
            f"The number of heads differs between layers ({each}), so there is no [layer head] to return. "
            "activation_patch(names=...) replaces a layer's hook_z as a whole."
        )
    source = _source(model, other, names)
    if other is not None and other.shape[0] not in (1, clean.shape[0]):
        source = {name: value.mean(0, keepdim=True) for name, value in source.items()}
    patches = [_Patch(name, _part(points[name].axes, pos, head), source.get(name)) for name, head in heads]
    with torch.no_grad():
        base = metric(model(clean))
    streams = _streams(model, clean)
    effects = torch.stack(_run(model, clean, patches, metric, batch_size, progress, streams))
    return effects.unflatten(0, (len(counts), -1)) - base


def _check_metric(metric: object, call: str) -> None:
    if not callable(metric):
        raise InputError(
            f"Expected a metric, a function of the logits such as logit_difference(3, 5); got {metric!r:.60}. "
            f"The order is {call}."
        )


def _check_places(name: str, axes: str, pos: Positions, region: Region) -> None:
    own = set(axes.split())
    grid = {"row", "column"} <= own
    if pos is not None and not {"pos", "query_pos"} & own:
        instead = "give region=(rows, columns) instead" if grid else "leave pos out"
        raise InputError(f"{name} ({axes}) has no positions to choose from; {instead}.")
    if region is None:
        return
    given: object = region
    if not (isinstance(given, tuple) and len(given) == 2 and all(isinstance(each, int | slice) for each in given)):
        raise InputError(f"Expected region=(rows, columns), each a number or a slice, got {given!r}.")
    if not grid:
        instead = "give pos= instead" if {"pos", "query_pos"} & own else "leave region out"
        raise InputError(f"{name} ({axes}) has no rows and columns to choose from; {instead}.")


class _Patch:
    """One replacement: at a hook point, a part of the activation by the same part of another."""

    def __init__(self, name: str, part: tuple[object, ...], source: Tensor | None):
        self.name = name
        self.part = part
        self.source = source

    def apply(self, rows: Tensor) -> None:
        """Edit one copy of the batch in place."""
        try:
            rows[self.part]
        except (IndexError, TypeError) as error:  # torch's ways to say it
            raise InputError(
                f"{self.name} is {list(rows.shape)} and has no such places ({error}): pos is a position, several, or a "
                "slice. model.layout_for(image).slice('cls') says where a subset is."
            ) from error
        if self.source is None:
            rows[self.part] = 0
            return
        if self.source.shape[1:] != rows.shape[1:] or self.source.shape[0] not in (1, rows.shape[0]):
            raise InputError(
                f"{self.name} is {list(rows.shape)} in the clean run and {list(self.source.shape)} in the other: "
                "give images of the same size, and as many of them or one."
            )
        rows[self.part] = self.source.expand_as(rows)[self.part]


def _block(name: str) -> str:
    """``stages.1.blocks.0.attn.hook_z`` is of ``stages.1.blocks.0``."""
    before, _, rest = f".{name}".rpartition(".blocks.")
    return f"{before}.blocks.{rest.partition('.')[0]}".removeprefix(".")


def _part(axes: str, pos: Positions, head: int | None = None, region: Region = None) -> tuple[object, ...]:
    """Return the index that picks positions or a region, and a head, from an activation with these axes."""
    row, column = region or (None, None)
    chosen = {"pos": pos, "query_pos": pos, "head": head, "row": row, "column": column}
    return tuple(slice(None) if chosen.get(name) is None else chosen[name] for name in axes.split())


def _source(model: HookedModel, other: Tensor | None, names: Sequence[str]) -> dict[str, Tensor]:
    if other is None:
        return {}
    with torch.no_grad():
        _, cache = model.run_with_cache(other, names=list(names), output=False)
    return dict(cache)


def _streams(model: HookedModel, clean: Tensor) -> dict[int, Tensor]:
    """Return the clean stream before each block, from where a run whose edits come later may start; or nothing.

    A pass that starts inside does not know the size of the picture, which rotary positions depend on.
    """
    if not isinstance(model, HookedViT):
        return {}
    if model.spec.rope is not None and tuple(clean.shape[2:]) != model.spec.image_size:
        return {}
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names="*.hook_resid_pre", output=False)
    return {layer: cache["resid_pre", layer] for layer in range(model.spec.n_layers)}


def _run(
    model: HookedModel,
    clean: Tensor,
    patches: Sequence[_Patch],
    metric: Metric,
    batch_size: int,
    progress: bool,
    streams: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """Return the metric under each patch, several patches a pass: each has a copy of the batch of its own.

    Args:
        patches: by layer in ascending order, where streams are given.
        streams: the clean stream before each block, if passes may start at the patched layer.
    """
    n = clean.shape[0]
    step = max(1, batch_size // n)
    batches: list[tuple[int | None, Sequence[_Patch]]] = []
    for layer, group in groupby(patches, key=lambda patch: layer_of(patch.name) if streams else None):
        members = list(group)
        batches += [(layer, members[start : start + step]) for start in range(0, len(members), step)]
    effects: list[Tensor] = []
    for layer, part in track(batches, description="Patching", transient=True, disable=not progress):
        start, how = (clean, {}) if not streams or layer is None else (streams[layer], {"start_at_layer": layer})
        hooks = {name: _editor(part, name, n) for name in {patch.name for patch in part}}
        with torch.no_grad():
            logits = model.run_with_hooks(start.repeat(len(part), *[1] * (start.ndim - 1)), hooks=hooks, **how)
            effects += [metric(rows) for rows in logits.split(n)]
    return effects


def _editor(patches: Sequence[_Patch], name: str, n: int) -> Callable[[Tensor, HookContext], None]:
    mine = [(index, patch) for index, patch in enumerate(patches) if patch.name == name]

    def edit(x: Tensor, at: HookContext) -> None:
        for index, patch in mine:
            patch.apply(x[index * n : (index + 1) * n])

    return edit
