"""Attribution between the features of coders in a model: what the features of one layer do to those of another.

Equation:
    effect(i -> j) = sum over tokens p of f_i[p] dF_j/df_i[p], where F_j is the feature j of the later coder, summed
    over its tokens (or at one), and the gradient runs through the model with both coders spliced in, error terms on.
Cost:
    One pass, and one backward pass for each target feature.
Misleads:
    Exact to first order alone: where a later TopK or ReLU switches, the effect of removing a feature is another. Check
    the largest by ablation (``prisma_patch.ablate`` at ``<hook>.sae.hook_features``).
Source:
    Marks et al. 2024 (sparse feature circuits); Dunefsky et al. 2024 (transcoder circuits).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from prisma_core import HookedModel, InputError, Result
from prisma_core.plugin import Indices, LayerQuery, checked, positions_of, taking_gradients
from prisma_sae.binding import placed
from prisma_sae.coder import SparseCoder
from prisma_sae.splice import FEATURES, splice


@checked
def feature_attribution(
    model: HookedModel,
    images: Tensor,
    coders: Sequence[SparseCoder] | Mapping[str | LayerQuery, SparseCoder],
    targets: int | Indices,
    *,
    pos: int | None = None,
    force: bool = False,
) -> Result:
    """Return the effects of the first coder's features on features of the second: ``[target source batch]``.

    >>> import prisma_core as prisma, torch
    >>> from prisma_sae import load
    >>> model, coder = prisma.load("toy:scenes-3l"), load("scenes-3l")
    >>> coders = {("resid_post", 0): coder, ("resid_post", 1): coder}
    >>> feature_attribution(model, torch.rand(1, 3, 96, 96), coders, [3], force=True).shape
    {'target': 1, 'source': 256, 'batch': 1}

    Args:
        model: any hooked model.
        images: what it takes.
        coders: two, by hook point or knowing their place; the one that fires first is the source.
        targets: features of the later one.
        pos: the token at which the targets are read, counted among those of the later coder; default the sum over all.
        force: attach coders where they were not trained.

    Raises:
        InputError: there are not two coders, or no such feature or token.
    """
    by_name = placed(model, coders)
    order = [name for name in model.hook_points() if name in by_name]
    if len(order) != 2:
        raise InputError(f"Expected two coders, at two places; got {len(order)}.")
    source, target = (f"{name}.{FEATURES}" for name in order)
    wanted = [targets] if isinstance(targets, int) else list(targets)
    n = by_name[order[1]].facts.d_sae
    if bad := [each for each in wanted if not 0 <= each < n]:
        raise InputError(f"No feature {bad[0]} in the coder at {order[1]}: they run from 0 to {n - 1}.")
    with taking_gradients(), splice(model, by_name, error_term=True, force=force):
        gradients: list[Tensor] = []
        with model.caching([source, target], detach=False) as cache, model.hooks({source: _leaf}):
            model(images)
        read = cache[target] if pos is None else _at(cache[target], pos, target)
        for index in wanted:
            grad = torch.autograd.grad(read[..., index].sum(), cache[source], retain_graph=True, allow_unused=True)[0]
            gradients.append(torch.zeros_like(cache[source]) if grad is None else grad)
    features = cache[source].detach()
    over = tuple(range(1, features.ndim - 1))
    effects = torch.stack([(features * grad).sum(over) if over else features * grad for grad in gradients])
    labels = [by_name[name].facts.labels for name in order]
    return Result(
        effects.transpose(1, 2),
        ("target", "source", "batch"),
        {
            "target": tuple(_label(labels[1], index) for index in wanted),
            "source": tuple(_label(labels[0], index) for index in range(effects.shape[-1])),
        },
        technique="feature_attribution",
        unit="activation of the target feature",
        baseline="the source feature at zero, to first order",
        facts={"source": source, "target": target, "pos": pos},
    )


def _at(features: Tensor, pos: int, name: str) -> Tensor:
    if features.ndim < 3:
        raise InputError(f"{name} has no tokens to choose from; leave pos out.")
    return features[:, positions_of([pos], features.shape[1])]


def _label(names: Mapping[int, str], index: int) -> str:
    return f"{index} {names[index]}" if index in names else str(index)


def _leaf(x: Tensor, at: object) -> Tensor:
    """Return the activation as a leaf of the graph, so that gradients by it are those of what reads it."""
    return x.detach().requires_grad_()
