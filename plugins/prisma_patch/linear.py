"""Attribution patching: the effect of every patch at once, to first order.

Equation:
    effect[p] = sum_i (b[p, i] - a[p, i]) * d metric / d a[p, i], summed over what the sweep does not name. Integrated
    over ``steps`` midpoints between the two runs' activations it is the path integral.
Cost:
    Two passes and one backward pass; ``steps`` times the latter when integrated.
Misleads:
    First order: wrong where a softmax saturates or effects are large. ``exact`` runs the largest ones for real.
Source:
    Nanda 2023; Syed et al. 2023; Hanna et al. 2024 (integrated gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from prisma_lens.inputs import as_inputs, points_of
from prisma_lens.metrics import MetricLike, as_metric
from torch import Tensor

from prisma_core import HookContext, HookedModel, InputError, Result
from prisma_core.plugin import Natural, Query, checked, layer_of
from prisma_patch.passes import Inputs
from prisma_patch.patching import SHORT
from prisma_patch.places import check_layers_swept


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
) -> Result:
    """Return the first-order effect of replacing each place by the other run's: ``[*over batch]``.

    Args:
        model, clean, metric, at, over: as in ``activation_patch``.
        other: inputs whose activations would be put in, as many as ``clean`` or one for all.
        steps: 0 takes the gradient of the clean run; more integrate it over that many midpoints of the straight line
            between the two activations, each hook point by itself.

    Raises:
        UnknownName: a hook point or class that does not exist.
        InputError: the runs do not fit together, or an activation has no such axis.
    """
    measure, names, inputs = as_metric(model, metric), points_of(model, at), as_inputs(model, clean)
    axes = [SHORT.get(name, name) for name in (over.split() if isinstance(over, str) else over)]
    check_layers_swept(at, names, axes, over)
    points = model.hook_points()
    with torch.no_grad():
        _, theirs = model.run_with_cache(*as_inputs(model, other), names=names, output=False)
    output, ours = model.run_with_cache(*inputs, names=names, loss=lambda out: measure(out).sum())
    parts: list[Tensor] = []
    for name in names:
        a, b = ours[name], theirs[name]
        if a.shape[1:] != b.shape[1:] or b.shape[0] not in (1, a.shape[0]):
            raise InputError(f"{name} is {list(a.shape)} in the clean run and {list(b.shape)} in the other.")
        difference = b - a
        gradient = ours.grad[name] if not steps else _integrated(model, inputs, measure, name, a, b, steps)
        names_of_axes = points[name].axes.split()
        swept = [axis for axis in axes if axis != "layer"]
        if lacking := [axis for axis in swept if axis not in names_of_axes]:
            raise InputError(f"{name} ({points[name].axes}) has no axis {lacking[0]!r}.")
        gone = [at for at, axis in enumerate(names_of_axes) if axis not in (*swept, "batch")]
        effect = (difference * gradient).sum(gone) if gone else difference * gradient
        there = [axis for axis in names_of_axes if axis in (*swept, "batch")]
        parts.append(effect.permute(*(there.index(axis) for axis in (*swept, "batch"))))
    stacked = torch.stack(parts)
    stacked = stacked[0] if "layer" not in axes else stacked.movedim(0, axes.index("layer"))
    labels: dict[str, tuple[str, ...]] = {}
    if "layer" in axes:
        labels["layer"] = tuple(f"L{layer_of(name)}" for name in names)
    if "head" in axes:
        labels["head"] = tuple(f"H{head}" for head in range(stacked.shape[axes.index("head")]))
    layout = model.layout_for(*inputs)
    if "pos" in axes and layout is not None and stacked.shape[axes.index("pos")] == layout.n_tokens:
        labels["pos"] = tuple(layout.token_names())
    return Result(
        stacked,
        (*axes, "batch"),
        labels,
        technique="attribution_patch",
        unit="change of the metric, to first order",
        baseline="the clean run",
        tensors={"clean": measure(output.detach())},
        facts={"steps": steps},
    )


def _integrated(
    model: HookedModel, inputs: Inputs, measure: Any, name: str, a: Tensor, b: Tensor, steps: int
) -> Tensor:
    total = torch.zeros_like(a)
    for step in range(steps):
        mixed = a + (step + 0.5) / steps * (b - a)

        def put(x: Tensor, at: HookContext, mixed: Tensor = mixed) -> Tensor:
            return mixed.to(x)

        _, cache = model.run_with_cache(*inputs, names=name, hooks={name: put}, loss=lambda out: measure(out).sum())
        total = total + cache.grad[name]
    return total / steps
