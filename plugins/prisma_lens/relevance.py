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

import torch
from torch import Tensor

from prisma_core import HookedModel, Result
from prisma_core.plugin import checked
from prisma_lens.heads import pattern_names
from prisma_lens.inputs import Inputs, as_inputs, vision_of
from prisma_lens.metrics import MetricLike, as_metric


@checked
def relevance(model: HookedModel, images: Tensor | Inputs, metric: MetricLike) -> Result:
    """Return the relevance of each token of the input for each token at the end: ``[batch pos source]``.

    ``result.sel(pos="cls")`` is the map of a model that reads its class token.

    Args:
        model: as in ``head_scores``.
        images: what it takes; for a dual encoder images and tokens, ``(images, model.tokens(texts))``.
        metric: a function of the output, a class, or two (see ``as_metric``).

    Raises:
        NotApplicable: as ``head_scores``.
        UnknownName: no such class.
    """
    inputs, tower = as_inputs(model, images), vision_of(model)
    bare, layout = pattern_names(tower, inputs[0])
    names = bare if tower is model else [f"vision.{name}" for name in bare]
    measure = as_metric(model, metric)
    _, cache = model.run_with_cache(*inputs, names=names, loss=lambda out: measure(out).sum())
    eye = torch.eye(layout.n_tokens, device=inputs[0].device, dtype=cache[names[0]].dtype)
    total = eye.expand(len(inputs[0]), -1, -1)
    for name in names:
        total = total + (cache[name] * cache.grad[name]).relu().mean(1) @ total
    tokens = tuple(layout.token_names())
    return Result(
        total - eye,
        ("batch", "pos", "source"),
        {"pos": tokens, "source": tokens},
        technique="relevance",
        unit="relevance",
        baseline="each token's own, 1, left out",
    )
