"""Induction in vision: which heads look from a patch to its copy, or beside the copy, and what they copy.

Equation:
    score[kind, l, h] = mean over pairs of patches (a, b) of pattern[a, k(b)] with the pixels of a put into b, less the
    same with b as it was; k(b) is b itself (``copy``) or its neighbour to the right, left, above, below. Both ways
    round, for attention has no direction in time here.
Cost:
    Two passes for each batch, with every pattern.
Misleads:
    A head may look at a copy and bring nothing of it: ``tensors["copied"]`` says how much of the copy's own stream it
    writes. A patch put elsewhere is an image that no camera took.
Source:
    Olsson et al. 2022 for text. For images: open problem 9 of "Introducing Prisma" (Joseph 2024), answered here by
    pairs with a control.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from prisma_core import HookedModel, HookedViT, InputError, NotApplicable, Result, TokenLayout, attentions
from prisma_core.plugin import Count, Seed, checked, widened
from prisma_lens.attribute import check_linear_in_values, check_sum_of
from prisma_lens.heads import layer_pattern, pattern_names
from prisma_lens.inputs import as_input
from prisma_lens.readouts import tower_of

KINDS = {"copy": (0, 0), "right": (0, 1), "left": (0, -1), "above": (-1, 0), "below": (1, 0)}


@checked
@torch.no_grad()
def induction(model: HookedModel, images: Any, *, pairs: Count = 4, batch_size: Count = 16, seed: Seed = 0) -> Result:
    """Return how much more each head attends to a patch's copy, or beside it, than without one: ``[kind layer head]``.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> induction(model, torch.rand(2, 3, 96, 96)).shape
    {'kind': 5, 'layer': 3, 'head': 4}

    Args:
        model: a canonical vision transformer of images, or a dual encoder.
        images: ``[batch channel height width]``; varied ones, whose patches differ.
        pairs: how many patches are copied in each image.
        batch_size: images run at once.
        seed: of the places.

    Returns:
        The differences, NaN of a kind that no pair has (in one row of patches, none is above another);
        ``tensors["repeated"]`` and ``tensors["control"]`` are what they are differences of, and
        ``tensors["copied"]`` ``[layer head]`` how much of the copy's stream, its mean over tokens taken out, a head
        writes into the patch that looks at it: 1 is all of it.

    Raises:
        NotApplicable: the model reads videos, or has no patterns over all tokens.
        InputError: more patches than the image has.
    """
    own = tower_of(model, "vision")
    if not isinstance(own, HookedViT) or own.spec.n_frames is not None:
        raise NotApplicable("Copies of patches are made in images: this model reads something else.")
    images = as_input(own, images)
    names, layout = pattern_names(own, images)
    if layout is None:
        raise NotApplicable("This model has no token layout, so its patches have no places.")
    if not 1 <= 2 * pairs <= layout.n_patches:
        raise InputError(f"{pairs} pairs take {2 * pairs} patches, and the image has {layout.n_patches}.")
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(layout.n_patches, generator=generator)[: 2 * pairs] for _ in images])
    totals = {"repeated": list[Tensor](), "control": list[Tensor]()}
    counts, copied = list[Tensor](), list[Tensor]()
    for part, where in zip(images.split(batch_size), places.split(batch_size), strict=True):
        repeated = _with_copies(part, where, layout, own.spec.embed.patch)
        keys, inside = _keys(where.to(part.device), layout)
        counts.append(inside.sum((1, 2)))
        for key, batch in (("repeated", repeated), ("control", part)):
            _, cache = own.run_with_cache(batch, names=list(chain(*names)), output=False)
            patterns = [layer_pattern(cache, each) for each in names]
            totals[key].append(_attention(patterns, where.to(part.device), keys, inside, layout.n_prefix))
        copied.append(_copied(own, repeated, where, layout.n_prefix) * len(part))
    n = torch.stack(counts).sum(0)[:, None, None]
    means = {key: torch.stack(each).sum(0) / n for key, each in totals.items()}
    values = means["repeated"] - means["control"]
    return Result(
        values,
        ("kind", "layer", "head"),
        {
            "kind": tuple(KINDS),
            "layer": tuple(f"L{layer}" for layer in range(values.shape[1])),
            "head": tuple(f"H{head}" for head in range(values.shape[2])),
        },
        technique="induction",
        unit="share of attention",
        baseline="the same places in the images without copies",
        tensors={**means, "copied": torch.stack(copied).sum(0) / len(images)},
        facts={"pairs": pairs, "images": len(images), "seed": seed},
    )


def _with_copies(images: Tensor, where: Tensor, layout: TokenLayout, patch: tuple[int, int]) -> Tensor:
    """Return the images with the first half of the places' pixels put into the second half."""
    images, (high, wide) = images.clone(), patch
    first, second = where.chunk(2, 1)
    for at in range(len(images)):
        for a, b in zip(first[at].tolist(), second[at].tolist(), strict=True):
            (up, left), (row, column) = divmod(a, layout.columns), divmod(b, layout.columns)
            pixels = images[at, :, up * high : (up + 1) * high, left * wide : (left + 1) * wide].clone()
            images[at, :, row * high : (row + 1) * high, column * wide : (column + 1) * wide] = pixels
    return images


def _both_ways(where: Tensor) -> tuple[Tensor, Tensor]:
    first, second = where.chunk(2, 1)
    return torch.cat([first, second], 1), torch.cat([second, first], 1)


def _keys(where: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Return the patches that each kind looks at, and which of them there are: ``[kind image pair]``."""
    _, copies = _both_ways(where)
    steps = torch.tensor(list(KINDS.values()), device=where.device)[:, :, None, None]
    row, column = copies // layout.columns + steps[:, 0], copies % layout.columns + steps[:, 1]
    inside = (row >= 0) & (row < layout.rows) & (column >= 0) & (column < layout.columns)
    return (row * layout.columns + column).where(inside, 0), inside


def _attention(patterns: list[Tensor], where: Tensor, keys: Tensor, inside: Tensor, n_prefix: int) -> Tensor:
    """Return the attention of each kind, summed over pairs that have such a neighbour: ``[kind layer head]``."""
    queries, _ = _both_ways(where)
    image, sums = torch.arange(len(where), device=where.device)[:, None], list[Tensor]()
    for at, here in zip(keys, inside, strict=True):
        seen = torch.stack([x[image, :, n_prefix + queries, n_prefix + at] for x in patterns])
        sums.append((seen * here[..., None]).sum((1, 2)))
    return torch.stack(sums)


def _copied(own: HookedViT, images: Tensor, where: Tensor, n_prefix: int) -> Tensor:
    """Return how much of the copy's stream each head writes into the patch that looks at it: ``[layer head]``."""
    branches = [(layer, block, each) for layer, block in enumerate(own.layers()) for each in attentions(block)]
    ends = [f"blocks.{layer}.{each.name}.hook_{end}" for layer, _, each in branches for end in ("pattern", "v")]
    _, cache = own.run_with_cache(images, names=[*ends, "resid_pre"], output=False)
    queries, copies = (n_prefix + each.to(images.device) for each in _both_ways(where))
    image, rows = torch.arange(len(images), device=images.device)[:, None], list[Tensor]()
    for layer, block, branch in branches:
        check_sum_of(layer, block, "ln1", "heads", "attn_out")
        name, spec = f"blocks.{layer}.{branch.name}", branch.module.spec
        check_linear_in_values(layer, branch)
        stream = widened(cache["resid_pre", layer])
        content = (stream - stream.mean(1, keepdim=True))[image, copies]  # [batch pair d_model]
        v = widened(cache[f"{name}.hook_v"]).repeat_interleave(spec.n_heads // spec.n_kv_heads, 2)
        v = (v - v.mean(1, keepdim=True))[image, copies]
        written = torch.einsum("bphe,hed->bphd", v, branch.scaled(branch.module.W_O).to(v))
        weight = cache[f"{name}.hook_pattern"][image, :, queries, copies]
        along = torch.einsum("bphd,bpd->bph", written, content) / content.square().sum(-1, keepdim=True).clamp_min(
            1e-12
        )
        rows.append((weight * along).mean((0, 1)))
    sides = own.spec.blocks[0].n_parallel
    return torch.stack([torch.cat(rows[first : first + sides]) for first in range(0, len(rows), sides)])
