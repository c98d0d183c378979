"""Saliency by gradients at any hook point: gradient x activation, integrated gradients, Grad-CAM on the model's grid.

Equation:
    gradient x activation: sum_d a[p, d] dm/da[p, d]. Integrated: sum_d (a - b)[p, d] * mean over the straight line
    from b to a of dm/da. Grad-CAM: relu(sum_d w[d] a[p, d]), w the mean of the gradient over patches.
Cost:
    One pass and one backward pass; integrated gradients one of each for every step.
Misleads:
    A gradient is local: where the output saturates it vanishes although the place matters. Integrated gradients
    depend on the baseline. Grad-CAM's relu hides what speaks against a class.
Source:
    Sundararajan et al. 2017; Selvaraju et al. 2017. AttnLRP is left out: its authors' code carries a patent notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from prisma_core import HookContext, HookedModel, InputError, NotApplicable, Result
from prisma_core.plugin import Count, LayerQuery, checked
from prisma_lens.inputs import TOKEN_AXES, Inputs, as_inputs, one_point
from prisma_lens.metrics import MetricLike, as_loss, as_metric


@checked
def gradient_x_activation(
    model: HookedModel, images: Tensor | Inputs, metric: MetricLike, at: str | LayerQuery = "hook_full_embed"
) -> Result:
    """Return the gradient times the activation at a hook point, summed over its last axis: ``[batch pos]``.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> gradient_x_activation(model, torch.zeros(1, 3, 96, 96), "ladybird").shape
    {'batch': 1, 'pos': 145}

    Args:
        model: any hooked model.
        images: what it takes; for a dual encoder images and tokens, ``(images, model.tokens(texts))``.
        metric: a function of the output, a class, or two (see ``as_metric``); one number for each image.
        at: a hook point.

    Raises:
        UnknownName: no such class or hook point, or several hook points.
        InputError: the images or the metric do not fit the model.
    """
    name, loss, inputs = one_point(model, at), as_loss(model, metric), as_inputs(model, images)
    _, cache = model.run_with_cache(*inputs, names=name, loss=loss)
    values = weighted(cache[name], cache.grad[name]).sum(-1)
    return _saliency(model, name, inputs, values, "gradient_x_activation", {})


@checked
def integrated_gradients(
    model: HookedModel,
    images: Tensor | Inputs,
    metric: MetricLike,
    at: str | LayerQuery = "hook_full_embed",
    *,
    baseline: Tensor | Literal["zero", "mean"] = "zero",
    steps: Count = 32,
) -> Result:
    """Return integrated gradients at a hook point, summed over its last axis: ``[batch pos]``.

    They sum to ``metric(a) - metric(baseline)`` up to the error of the midpoint rule, which ``facts["gap"]`` states.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> integrated_gradients(model, torch.zeros(1, 3, 96, 96), ("ladybird", 3), steps=4).shape
    {'batch': 1, 'pos': 145}

    Args:
        model, images, metric, at: as in ``gradient_x_activation``.
        baseline: the activation to start from, as an image's or one for all; ``"zero"``, or the ``"mean"`` over tokens.
        steps: points on the line.

    Raises:
        UnknownName: no such class or hook point, or several hook points.
        InputError: the baseline does not fit.
    """
    name, measure, inputs = one_point(model, at), as_metric(model, metric), as_inputs(model, images)
    loss, axes = as_loss(model, metric), model.hook_points()[name].axes.split()
    output, cache = model.run_with_cache(*inputs, names=name)
    a = cache[name]
    if isinstance(baseline, Tensor):
        if tuple(baseline.shape) not in {tuple(a.shape), (1, *a.shape[1:]), tuple(a.shape[1:])}:
            raise InputError(f"Expected a baseline {list(a.shape)}, as {name} is; got {list(baseline.shape)}.")
        b = baseline.to(a).expand_as(a)
    elif baseline == "zero":
        b = torch.zeros_like(a)
    else:
        over = [at for at, axis in enumerate(axes) if axis in TOKEN_AXES]
        if all(a.shape[at] == 1 for at in over):
            raise InputError(
                f"{name} ({' '.join(axes)}, {list(a.shape)}) has no two tokens to take the mean of: give a baseline, "
                "or 'zero'."
            )
        b = a.mean(over, keepdim=True).expand_as(a)
    total = torch.zeros_like(a)
    for step in range(steps):
        mixed = between(b, a, (step + 0.5) / steps)
        _, one = model.run_with_cache(*inputs, names=name, hooks={name: _put(mixed)}, loss=loss)
        total = total + one.grad[name]
    values = weighted(a - b, total / steps).sum(-1)
    with torch.no_grad():
        start = measure(model.run_with_hooks(*inputs, hooks={name: _put(b)}))
        change = measure(output) - start
    gap = (values.reshape(len(values), -1).sum(1) - change).abs().max().item()
    return _saliency(model, name, inputs, values, "integrated_gradients", {"steps": steps, "gap": gap}, change)


@checked
def grad_cam(
    model: HookedModel,
    images: Tensor | Inputs,
    metric: MetricLike,
    at: str | LayerQuery = ("resid_post", -2),
    *,
    relu: bool = True,
) -> Result:
    """Return Grad-CAM on the grid of patches: ``[batch row column]``, of a video ``[batch frame row column]``.

    The grid comes from the model's layout, so prefix tokens, windows and frames need no reshaping by hand.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> grad_cam(model, torch.zeros(1, 3, 96, 96), "ladybird").shape
    {'batch': 1, 'row': 12, 'column': 12}

    Args:
        model, images, metric: as in ``gradient_x_activation``.
        at: a hook point with tokens or a grid; by default the stream before the last block, since patches behind the
            last attention of a model that reads its class token have no gradient.
        relu: keep what speaks for the class alone.

    Raises:
        UnknownName: no such class or hook point, or several hook points.
        NotApplicable: no patch of it has a gradient.
    """
    name, loss, inputs = one_point(model, at), as_loss(model, metric), as_inputs(model, images)
    _, cache = model.run_with_cache(*inputs, names=name, loss=loss)
    axes = model.hook_points()[name].axes.split()
    if {"row", "column"} <= set(axes):
        x, grad = cache[name], cache.grad[name]
    else:
        x, grad = cache.patches(name), cache.grad.patches(name)
    if not grad.any():
        raise NotApplicable(
            f"No patch of {name} has a gradient: nothing behind it reads the patches. Take an earlier layer."
        )
    n_places = x.ndim - sum(axis not in ("batch", *TOKEN_AXES) for axis in axes) - 1
    cam = x * grad.mean(list(range(1, 1 + n_places)), keepdim=True)
    cam = cam.flatten(1 + n_places).sum(-1)
    cam = cam.relu() if relu else cam
    names = ("batch", *(["frame"] if n_places == 3 else []), "row", "column")
    return Result(cam, names, technique="grad_cam", unit="relevance", facts={"at": name})


def weighted(x: Tensor, gradient: Tensor) -> Tensor:
    """Return ``x * gradient``, 0 where the gradient is 0: scores of keys that are masked are infinite."""
    return torch.where(gradient == 0, 0, x * gradient)


def between(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Return the point that lies this share of the way from ``a`` to ``b``, which may be infinite where they agree."""
    return torch.where(a == b, a, a + share * (b - a))


def _put(value: Tensor) -> Callable[[Tensor, HookContext], Tensor]:
    def put(x: Tensor, at: HookContext) -> Tensor:
        return value.to(x)

    return put


def _saliency(
    model: HookedModel,
    name: str,
    inputs: Inputs,
    values: Tensor,
    technique: str,
    facts: Mapping[str, Any],
    total: Tensor | None = None,
) -> Result:
    axes = model.hook_points()[name].axes.split()[:-1]
    layout = None if name.startswith("text.") else model.layout_for(*inputs)
    labels = {}
    for axis, size in zip(axes, values.shape, strict=True):
        if layout is not None and axis in ("pos", "patch"):
            tokens = layout.token_names()[layout.n_prefix if axis == "patch" else 0 :]
            if len(tokens) == size:
                labels[axis] = tuple(tokens)
    return Result(
        values,
        tuple(axes),
        labels,
        technique=technique,
        unit="change of the metric",
        total="" if total is None else "the metric less its value at the baseline",
        tensors={} if total is None else {"total": total},
        facts={"at": name, **facts},
    )
