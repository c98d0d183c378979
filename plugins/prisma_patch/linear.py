"""Attribution patching: the effect of every patch at once, to first order.

Equation:
    effect[p] = sum_i (b[p, i] - a[p, i]) * d metric / d a[p, i], summed over what the sweep does not name. Integrated
    over ``steps`` midpoints between the two runs' activations it is the path integral.
Cost:
    Two passes and one backward pass; ``steps`` times the latter when integrated.
Misleads:
    First order: wrong where a softmax saturates or effects are large. ``exact=`` runs the largest ones for real.
Source:
    Nanda 2023; Syed et al. 2023; Hanna et al. 2024 (integrated gradients).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from prisma_lens.gradients import between, weighted
from prisma_lens.inputs import as_inputs
from prisma_lens.metrics import Metric, MetricLike, as_loss, as_metric
from torch import Tensor

from prisma_core import HookContext, HookedModel, InputError, Result
from prisma_core.plugin import Natural, Query, checked
from prisma_patch.passes import Inputs, passes_of
from prisma_patch.patching import arranged, sweep_of, variants_of
from prisma_patch.places import Places, layout_at
from prisma_patch.sweeps import run


@checked
def attribution_patch(
    model: HookedModel,
    clean: Tensor | Inputs,
    other: Tensor | Inputs,
    metric: MetricLike,
    *,
    at: Query = "z",
    over: str | Sequence[str] = ("layer", "head"),
    steps: Natural = 0,
    exact: Natural = 0,
) -> Result:
    """Return the first-order effect of replacing each place by the other run's: ``[*over batch]``.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> clean, other = torch.rand(2, 1, 3, 96, 96)
    >>> attribution_patch(model, clean, other, "ladybird").shape
    {'layer': 3, 'head': 4, 'batch': 1}

    Args:
        model, clean, metric, at, over: as in ``activation_patch``.
        other: inputs whose activations would be put in, as many as ``clean`` or one for all.
        steps: 0 takes the gradient of the clean run; more integrate it over that many midpoints of the straight line
            between the two activations, each hook point by itself.
        exact: how many places, those of the largest effects over the batch, are patched for real besides.

    Returns:
        The effects; with ``exact`` their exact ones in ``tensors["exact"]``, NaN where none was measured.

    Raises:
        UnknownName: a hook point or class that does not exist.
        InputError: the runs do not fit together, or an activation has no such axis.
        NotApplicable: the hook points have parts of different number.
    """
    measure, loss, inputs = as_metric(model, metric), as_loss(model, metric), as_inputs(model, clean)
    others = as_inputs(model, other)
    axes, names = sweep_of(model, at, over)
    places = Places(model, names, axes, layout_at(model, names, *inputs), None, None, None)
    with torch.no_grad():
        _, theirs = model.run_with_cache(*others, names=names, output=False)
    output, ours = model.run_with_cache(*inputs, names=names, loss=loss)
    parts: list[Tensor] = []
    for name in names:
        a, b = ours[name], theirs[name]
        if a.shape[1:] != b.shape[1:] or b.shape[0] not in (1, a.shape[0]):
            raise InputError(f"{name} is {list(a.shape)} in the clean run and {list(b.shape)} in the other.")
        gradient = ours.grad[name] if not steps else _integrated(model, inputs, loss, name, a, b, steps)
        axes_of, kept = places.axes[name], [str(places.own(name, axis)) for axis in places.swept]
        front = [axes_of.index(axis) for axis in (*kept, "batch")]
        effect = weighted(b - a, gradient).movedim(front, list(range(len(front))))
        effect = effect.reshape(*effect.shape[: len(front)], -1).sum(-1)
        parts.append(effect.flatten(0, -2) if kept else effect[None])
    counts, rows = places.counts(names, ours), torch.cat(parts)
    values = arranged(rows, names, axes, counts, places.swept)
    tensors = {"clean": measure(output.detach())}
    if exact:
        real = torch.full_like(rows, float("nan"))
        chosen = rows.abs().sum(-1).topk(min(exact, len(rows))).indices
        variants, passes = variants_of(places, names, ours, theirs), passes_of(model, inputs)
        real[chosen] = run(passes, [variants[at] for at in chosen.tolist()], measure) - tensors["clean"]
        tensors["exact"] = arranged(real, names, axes, counts, places.swept)
    labels = places.labels(names, ours, values.shape[axes.index("head")] if "head" in axes else 0)
    return Result(
        values,
        (*axes, "batch"),
        {axis: labels[axis] for axis in axes if axis in labels},
        technique="attribution_patch",
        unit="change of the metric, to first order",
        baseline="the clean run",
        tensors=tensors,
        facts={"steps": steps},
    )


def _integrated(
    model: HookedModel, inputs: Inputs, loss: Metric, name: str, a: Tensor, b: Tensor, steps: int
) -> Tensor:
    total = torch.zeros_like(a)
    for step in range(steps):
        mixed = between(a, b, (step + 0.5) / steps)

        def put(x: Tensor, at: HookContext, mixed: Tensor = mixed) -> Tensor:
            return mixed.to(x)

        _, cache = model.run_with_cache(*inputs, names=name, hooks={name: put}, loss=loss)
        total = total + cache.grad[name]
    return total / steps
