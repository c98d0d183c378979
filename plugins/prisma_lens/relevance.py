"""Relevance by attention and its gradient: which tokens each token's answer depends on, layer after layer.

Equation:
    R = I; for each layer R <- R + mean over heads of relu(pattern * dm/dpattern) R, m the metric.
Cost:
    One pass and one backward pass, with every pattern explicit and its gradient.
Misleads:
    What speaks against the metric is cut off at 0, so it is a map of support alone; MLPs and values do not count.
    For a model that pools, read the mean over its tokens' rows.
Source:
    Chefer, Gur and Wolf, "Generic Attention-model Explainability" (2021), for self-attention. AttnLRP, which goes
    through every operation, is left out: its authors' code carries a patent notice.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from prisma_core import HookedDual, HookedModel, Result
from prisma_core.plugin import checked, widened
from prisma_lens.heads import layer_pattern, pattern_names
from prisma_lens.inputs import Inputs, as_inputs
from prisma_lens.metrics import MetricLike, as_loss
from prisma_lens.readouts import TowerName


@checked
def relevance(
    model: HookedModel, images: Tensor | Inputs, metric: MetricLike, *, tower: TowerName = "vision"
) -> Result:
    """Return the relevance of each token of the input for each token at the end: ``[batch pos source]``.

    ``result.sel(pos="cls")`` is the map of a model that reads its class token.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> relevance(model, torch.zeros(1, 3, 96, 96), "ladybird").sel(pos="cls").shape
    {'batch': 1, 'source': 145}

    Args:
        model: as in ``rollout``.
        images: what it takes; for a dual encoder images and tokens, ``(images, model.tokens(texts))``.
        metric: a function of the output, a class, or two (see ``as_metric``); one number for each image.
        tower: of a dual encoder, whose tokens: of ``text`` those of each text, for the sum of the metric over images.

    Raises:
        NotApplicable: as ``rollout``.
        UnknownName: no such class.
        InputError: the metric has several numbers for an image.
    """
    inputs, measure, own, prefix = as_inputs(model, images), as_loss(model, metric), model, ""
    given = inputs[0]
    if isinstance(model, HookedDual):
        own, given, prefix = getattr(model, tower), inputs[-1 if tower == "text" else 0], f"{tower}."
    layers, layout = pattern_names(own, given)
    layers = [[f"{prefix}{name}" for name in names] for names in layers]
    _, cache = model.run_with_cache(*inputs, names=list(chain(*layers)), loss=measure)
    pairs = ((layer_pattern(cache, names), layer_pattern(cache.grad, names)) for names in layers)
    supports = [(widened(pattern) * widened(gradient)).relu().mean(1) for pattern, gradient in pairs]
    total = torch.zeros_like(supports[0])  # without each token's own 1, beside which a half dtype has no small shares
    for support in supports:
        total = total + support + support @ total
    tokens = () if layout is None else tuple(layout.token_names())
    return Result(
        total.to(cache[layers[0][0]].dtype),
        ("batch", "pos", "source"),
        {"pos": tokens, "source": tokens} if tokens else {},
        technique="relevance",
        unit="relevance",
        baseline="each token's own, 1, left out",
    )
