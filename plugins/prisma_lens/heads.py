"""Scores of heads: corners, edges, rows, columns, neighbours, class token, registers, earlier frames.

Equation:
    score[kind, layer, head] = mean over images and queries of the attention that falls on the keys of that kind,
    sum_k pattern[q, k] [k is of that kind for q]. The baseline is the same sum of a uniform pattern.
Cost:
    One pass with every pattern; memory for the patterns of one layer at a time of a batch.
Misleads:
    Attention to a place is no evidence that what is read there matters: see attribution by source, or knock the
    edge out. Kinds overlap (a corner is on an edge), so scores do not sum to 1.
Source:
    The kinds are those of the Prisma project's tour of attention heads (Joseph 2024). Rollout: Abnar and Zuidema 2020.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from prisma_core import HookedModel, InputError, NotApplicable, Result, TokenLayout
from prisma_core.plugin import Count, Share, blaming, checked, layer_of, shown, widened
from prisma_lens.inputs import as_input, vision_of

MODULI = range(2, 9)
SIDE = re.compile(r"(?<=\.attn)\.\d+\.hook_pattern$")
"""The end of a pattern's name where several attentions stand side by side in a layer."""


@checked
def head_scores(model: HookedModel, images: Any, *, batch_size: Count = 16) -> Result:
    """Return how much of each head's attention falls on each kind of token: ``[kind layer head]``.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> head_scores(model, torch.zeros(1, 3, 96, 96)).shape
    {'kind': 14, 'layer': 3, 'head': 4}

    Queries are the patches. Kinds: ``self``, ``corner``, ``edge``, ``row`` and ``column`` (others in the query's own),
    ``local`` (the eight neighbours), ``previous_frame`` (the same place, one frame earlier), ``modulus 2`` to
    ``modulus 8`` (patches a multiple of that further on or back), ``cls``, ``registers``. Kinds that the layout lacks
    are left out.

    Args:
        model: any hooked model with patterns ``[batch head query_pos key_pos]`` over all tokens; of a dual encoder its
            vision tower. Heads of attentions side by side follow each other.
        images: ``[batch channel height width]``, or videos, or what ``model.preprocess`` reads.
        batch_size: images run at once.

    Returns:
        ``values``: shares of attention. ``tensors["baseline"]``: of uniform attention, ``[kind]``.

    Raises:
        NotApplicable: the model has no patterns over all tokens, or no token layout.
    """
    model = vision_of(model)
    images = as_input(model, images)
    names, layout = pattern_names(model, images, every=False)
    if layout is None:
        raise NotApplicable("This model has no token layout, so its tokens have no places.")
    kinds = key_kinds(layout)
    masks = torch.stack(list(kinds.values())).float()  # [kind query key]
    total, n = torch.zeros(len(masks), len(names), 0), 0
    for part in images.split(batch_size):
        with torch.no_grad():
            _, cache = model.run_with_cache(part, names=list(chain(*names)), output=False)
        patches = [widened(layer_pattern(cache, each)[:, :, layout.n_prefix :]) for each in names]
        if len({x.shape[1] for x in patches}) != 1:
            raise NotApplicable("The layers differ in their number of heads, so there is no [layer head] to return.")
        here = masks.to(patches[0])
        shares = torch.stack([torch.einsum("bhqk,cqk->ch", x, here) / x.shape[2] for x in patches], 1)
        total = (total.to(shares) if n else torch.zeros_like(shares)) + shares
        n += len(part)
    values = total / n
    return Result(
        values,
        ("kind", "layer", "head"),
        {
            "kind": tuple(kinds),
            "layer": tuple(map(layer_label, names)),
            "head": tuple(f"H{head}" for head in range(values.shape[-1])),
        },
        technique="head_scores",
        unit="share of attention",
        baseline="uniform attention (tensors['baseline'])",
        tensors={"baseline": masks.mean((1, 2)).to(values)},
        facts={"images": n},
    )


def key_kinds(layout: TokenLayout) -> dict[str, Tensor]:
    """Return which keys are of which kind for each patch: masks ``[patch token]``, those without any key left out."""
    n, prefix = layout.n_patches, layout.n_prefix
    place = torch.arange(n)
    if layout.order == "row column frame":
        frame, cell = place % layout.frames, place // layout.frames
    else:
        frame, cell = place // (layout.rows * layout.columns), place % (layout.rows * layout.columns)
    row, column = cell // layout.columns, cell % layout.columns
    same = frame[:, None] == frame
    other = place[:, None] != place
    top, side = (row == 0) | (row == layout.rows - 1), (column == 0) | (column == layout.columns - 1)
    near = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) == 1
    patches: dict[str, Tensor] = {
        "self": ~other,
        "corner": (top & side).expand(n, n) & same,
        "edge": (top | side).expand(n, n) & same,
        "row": (row[:, None] == row) & other & same,
        "column": (column[:, None] == column) & other & same,
        "local": near & same,
        "previous_frame": (cell[:, None] == cell) & (frame[:, None] == frame + 1),
        **{f"modulus {m}": other & ((place[:, None] - place) % m == 0) for m in MODULI},
    }
    masks = {kind: torch.nn.functional.pad(mask, (prefix, 0)) for kind, mask in patches.items()}
    tokens = torch.arange(layout.n_tokens)
    for kind in ("cls", "registers"):
        masks[kind] = torch.isin(tokens, tokens[layout.slice(kind)]).expand(n, -1)
    return {kind: mask for kind, mask in masks.items() if mask.any()}


@checked
def rollout(
    model: HookedModel,
    images: Any,
    *,
    residual: Share = 0.5,
    heads: Callable[[Tensor], Tensor] | None = None,
) -> Result:
    """Return attention rolled out over all layers: how much each token's stream mixes in each input token.

    ``A = product over layers of residual I + (1 - residual) mean over heads of the pattern``: ``[batch pos source]``.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> rollout(model, torch.zeros(1, 3, 96, 96)).sel(pos="cls").shape
    {'batch': 1, 'source': 145}

    Args:
        model: as in ``head_scores``; or a text tower, whose tokens have no names.
        images: as in ``head_scores``; of a text tower texts, or tokens of them.
        residual: the share of the residual connection.
        heads: how heads become one, ``[batch head query key] -> [batch query key]``; by default their mean.

    Raises:
        NotApplicable: the model has no patterns over all tokens.
    """
    steps, tokens = mixing_steps(model, images, residual, heads)
    mixed = steps[0]
    for step in steps[1:]:
        mixed = step @ mixed
    return Result(
        mixed,
        ("batch", "pos", "source"),
        {"pos": tokens, "source": tokens} if tokens else {},
        technique="rollout",
        unit="share",
        total="each row sums to 1",
        facts={"residual": residual},
    )


def mixing_steps(
    model: HookedModel, images: Tensor, residual: float, heads: Callable[[Tensor], Tensor] | None
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Return for each layer how it mixes tokens, ``[batch query key]`` with rows that sum to 1, and their names.

    Args:
        model, images, residual, heads: as in ``rollout``.

    Raises:
        NotApplicable: the model has no patterns over all tokens.
    """
    model = vision_of(model)
    images = as_input(model, images)
    names, layout = pattern_names(model, images)
    with torch.no_grad():
        _, cache = model.run_with_cache(images, names=list(chain(*names)), output=False)
    sizes = {layer_label(each): tuple(cache[each[0]].shape[-2:]) for each in names}
    if len(set(sizes.values())) > 1:
        raise NotApplicable(
            f"The layers differ in their tokens ({sizes}), so their patterns have no product. "
            "prisma_view.attention_page shows each layer's."
        )
    steps = list[Tensor]()
    for each in names:
        pattern = widened(layer_pattern(cache, each))
        one = pattern.mean(1) if heads is None else _merged(heads, pattern)
        step = residual * torch.eye(one.shape[-1]).to(one) + (1 - residual) * one
        steps.append(step / step.sum(-1, keepdim=True))
    return steps, () if layout is None else tuple(layout.token_names())


def _merged(heads: Callable[[Tensor], Tensor], pattern: Tensor) -> Tensor:
    with blaming(heads, "heads=", InputError):
        one = cast(object, heads(pattern))
    shape = (len(pattern), *pattern.shape[2:])
    if not isinstance(one, Tensor) or one.shape != shape:
        raise InputError(f"Expected heads= to return [batch query key], {list(shape)}; it returned {shown(one)}.")
    return one


def pattern_names(
    model: HookedModel, images: Tensor, *, every: bool = True
) -> tuple[list[list[str]], TokenLayout | None]:
    """Return the hook points of a model's patterns by layer, one or several side by side, and where its tokens are.

    Args:
        model, images: as in ``head_scores``.
        every: refuse a model in which some layers have other patterns, such as those of windows.

    Raises:
        NotApplicable: it has no patterns over all tokens.
    """
    points, axes = model.hook_points(), "batch head query_pos key_pos"
    layers = patterns_by_layer(model, lambda each: each == axes)
    others = [name for names in patterns_by_layer(model, lambda each: each != axes) for name in names]
    if not layers or (every and others):
        here = f"{others[0]} is [{points[others[0]].axes}]" if others else "this model has none"
        raise NotApplicable(f"This needs patterns [{axes}] over all tokens; {here}.")
    return layers, model.layout_for(images)


def patterns_by_layer(model: HookedModel, fitting: Callable[[str], bool]) -> list[list[str]]:
    """Return the hook points of a model's patterns whose axes fit, by layer, one or several side by side."""
    layers = dict[str, list[str]]()
    for name, point in model.hook_points().items():
        if layer_of(name) is not None and name.endswith("hook_pattern") and fitting(point.axes):
            layers.setdefault(SIDE.sub("", name), []).append(name)
    return list(layers.values())


def layer_pattern(cache: Any, names: list[str]) -> Tensor:
    """Return the patterns of a layer's heads, those of attentions side by side behind each other."""
    return torch.cat([cache[name] for name in names], 1)


def layer_label(names: list[str]) -> str:
    """Return ``L3`` for a layer of patterns, and the path of a block outside the main stack."""
    block = names[0].rpartition(".attn")[0]
    return f"L{layer_of(names[0])}" if block.startswith("blocks.") else block
