"""Sections of any model with patches or feature maps: principal components, attention, sizes of activations."""

from __future__ import annotations

from itertools import chain

import torch
from prisma_lens.heads import SIDE, layer_pattern
from torch import Tensor

from prisma_core import HookedModel, NotApplicable, Result
from prisma_core.plugin import layer_of
from prisma_view.figures import Figure, plot
from prisma_view.images import data_uri
from prisma_view.maps import pattern_names, within
from prisma_view.panels import Section, Subject, enlarged, spread

STREAM = "batch pos d_model"
FEATURE_MAPS = 6
FEW = 4
"""Heads whose whole pattern is drawn."""


def components(subject: Subject) -> Section:
    """Show the first three principal components of patches, or of feature maps, as red, green and blue."""
    images = []
    for name, grid in _grids(subject).items():
        colours, share = principal_colours(grid)
        images.append((data_uri(enlarged(colours)), f"{_spoken(name)}: {share:.0%} of the variance"))
    words = "Places of one colour are alike to the model: red, green and blue are the first three principal components."
    return Section("Patches by their principal components", words, images=tuple(images))


def principal_colours(grid: Tensor) -> tuple[Tensor, float]:
    """Return the first three principal components of patches ``[... d]``, in 0..1, and their share of the variance.

    Signs are fixed: the largest entry of each component's direction is positive.
    """
    x = grid.flatten(0, -2)
    x = x - x.mean(0)
    _, sizes, directions = torch.linalg.svd(x, full_matrices=False)
    n = min(3, len(sizes))
    largest = directions[:n].abs().argmax(-1, keepdim=True)
    axes = directions[:n] * directions[:n].gather(1, largest).sign()
    parts = x @ axes.T
    low, high = parts.amin(0), parts.amax(0)
    scaled = (parts - low) / (high - low).clamp_min(1e-12)
    scaled = torch.nn.functional.pad(scaled, (0, 3 - n))
    share = float((sizes[:n] ** 2).sum() / (sizes**2).sum().clamp_min(1e-30))
    return scaled.reshape(*grid.shape[:-1], 3), share


def _grids(subject: Subject) -> dict[str, Tensor]:
    """Return activations of some layers on the grid of their places: ``[row column d]``, of videos with frames first.

    Raises:
        NotApplicable: the model has no such activations.
    """
    tower, layout = subject.tower, subject.layout
    axes = {name: point.axes.split() for name, point in tower.hook_points().items()}
    streams = [name for name in axes if name.endswith("hook_resid_post") and " ".join(axes[name]) == STREAM]
    if layout is not None and streams:
        cache = _cached(subject, spread(streams))
        return {name: layout.grid(cache[name][0].float().cpu(), axis=0) for name in spread(streams)}
    maps = [name for name in feature_maps(tower) if len(axes[name]) == 4]
    if not maps:
        raise NotApplicable("This model has no stream of patches with a layout, and no feature maps with channels.")
    cache, grids = _cached(subject, spread(maps)), {}
    for name in spread(maps):
        (channel,) = set(axes[name]) - {"batch", "row", "column"}
        order = [axes[name].index(axis) for axis in ("batch", "row", "column", channel)]
        grids[name] = cache[name].permute(order)[0].float().cpu()
    return grids


def feature_maps(model: HookedModel) -> list[str]:
    """Return the hook points with rows and columns: those of the stream, or all where it has none.

    Raises:
        NotApplicable: the model has no activations with rows and columns.
    """
    points = model.hook_points()
    names = [name for name in points if {"row", "column"} <= set(points[name].axes.split())]
    if not names:
        raise NotApplicable("This model has no activations with rows and columns: its patches are tokens.")
    return [name for name in names if name.endswith("hook_resid_post")] or names


def features(subject: Subject) -> Section:
    """Show the norm of feature maps at each place, stage by stage.

    Raises:
        NotApplicable: the model has no activations with rows and columns.
    """
    names = spread(feature_maps(subject.tower), FEATURE_MAPS)
    cache, figures = _cached(subject, names), []
    for name in names:
        axes = subject.tower.hook_points()[name].axes.split()
        rest = [at for at, axis in enumerate(axes) if axis not in ("row", "column")]
        sizes = torch.linalg.vector_norm(cache[name].float(), dim=rest)
        order = ("row", "column") if axes.index("row") < axes.index("column") else ("column", "row")
        figures.append(plot(Result(sizes, order, technique=name, unit="norm over channels")))
    return Section("Feature maps", "The size of activations at each place, stage by stage.", tuple(figures))


def attention(subject: Subject) -> Section:
    """Show where the heads of some layers look: from the class token, or on average over tokens.

    Raises:
        NotApplicable: the model has no attention patterns over tokens.
    """
    names = spread(pattern_names(subject.tower))
    points, cache = subject.tower.hook_points(), _cached(subject, list(chain(*names)))
    kinds = [within(points[sides[0]].axes) or "" for sides in names]
    figures = [
        _heads(sides[0], layer_pattern(cache, sides)[0].float().cpu(), one, subject)
        for sides, one in zip(names, kinds, strict=True)
    ]
    shown = "How much the heads of the first, a middle and the last layer attend to each "
    kind = next(filter(None, kinds), "")
    if kind:
        words = f"{shown}token of their {kind}: each row a token that attends, the mean over all of them."
    elif subject.layout is None:
        words = f"{shown}token, on average over tokens: each row a head."
    else:
        words = f"{shown}patch, {'from the class token' if subject.layout.cls else 'on average over tokens'}."
    return Section("Where heads look", words, tuple(figures))


def _heads(name: str, pattern: Tensor, kind: str, subject: Subject) -> Figure:
    """Return the attention that tokens get, on the image where a layout says which token is where."""
    layout, unit, title = subject.layout, "share of attention", _spoken(name)
    if kind:
        mean = Result(pattern.mean(0), ("head", "query_pos", "key_pos"), technique=title, unit=unit)
        return plot(mean, kind="heat", panels=FEW)
    if layout is not None and pattern.shape[-1] == layout.n_tokens:
        heads = tuple(map(str, range(len(pattern))))
        return subject.patches(pattern[:, 0] if layout.cls else pattern.mean(1), title, unit, ("head", heads))
    return plot(Result(pattern.mean(1), ("head", "key_pos"), technique=title, unit=unit), kind="heat")


def _cached(subject: Subject, names: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return subject.tower.run_with_cache(subject.x, names=names, output=False)[1]


def _spoken(name: str) -> str:
    """Return where a hook point is, in words."""
    layer = layer_of(name)
    path = SIDE.sub(".hook_pattern", name).rpartition(".")[0].removesuffix(".attn")
    return f"layer {layer}" if layer is not None and path == f"blocks.{layer}" else path
