"""Metrics and classes: a number for each image from what a model returns."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torch import Tensor

from prisma_core import HookedModel, InputError, NotApplicable, UnknownName
from prisma_core.plugin import blaming, checked, shown, suggest, whole

Metric: TypeAlias = Callable[[Tensor], Tensor]
Class: TypeAlias = int | str
MetricLike: TypeAlias = Metric | Class | tuple[Class, Class]


@checked
def logit(which: int) -> Metric:
    """Return the metric ``logits[which]``: ``[batch class] -> [batch]``; classes count from 0.

    >>> import torch
    >>> logit(2)(torch.tensor([[0.0, 1.0, 5.0]]))
    tensor([5.])
    """
    return lambda logits: logits[:, _index(which, logits)]


@checked
def logit_difference(higher: int, lower: int) -> Metric:
    """Return the metric ``logits[higher] - logits[lower]``: ``[batch class] -> [batch]``.

    >>> import torch
    >>> logit_difference(2, 1)(torch.tensor([[0.0, 1.0, 5.0]]))
    tensor([4.])

    Raises:
        InputError: they are one class, whose difference from itself is 0 for every image.
    """
    if higher == lower:
        raise InputError(f"Expected two classes, got {higher} twice: the difference is 0 whatever the image shows.")
    return lambda logits: logits[:, _index(higher, logits)] - logits[:, _index(lower, logits)]


def _index(which: int, logits: Tensor) -> int:
    if logits.ndim != 2 or not 0 <= which < logits.shape[1]:
        raise UnknownName(f"No class {which} in an output {list(logits.shape)}: expected [batch class].")
    return which


@checked
def as_metric(model: HookedModel, metric: MetricLike, *, single: bool = False) -> Metric:
    """Return a metric as a function that checks what it returns.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> as_metric(model, ("ladybird", 3))(torch.eye(12)[:1])
    tensor([0.])

    Args:
        model: the model whose labels name the classes.
        metric: a function of the model's output with a number for each image ``[batch]`` or several ``[batch ...]``
            (of one image, the number alone will do; whole numbers and true or false become floating point numbers); or
            a class, as index or label, for its logit; or two classes, for the difference of their logits.
        single: one number for each image alone, as gradients and means need it.

    Raises:
        UnknownName: no such class; the nearest are suggested.
        InputError: it is none of these; or, of the function, it returned no number for each image, or several.
    """
    if isinstance(metric, str) or whole(metric) is not None:
        return logit(class_of(model, cast(Class, metric)))
    if isinstance(metric, tuple | list) and len(metric) == 2:
        return logit_difference(*(class_of(model, each) for each in metric))
    if not callable(metric):
        raise InputError(
            "Expected a metric: a function of the logits, a class (index or label), or two classes for their "
            f"difference; got {shown(metric)}."
        )

    def measure(output: Tensor) -> Tensor:
        with blaming(metric, "The metric", InputError):
            values = cast(object, metric(output))
        if isinstance(values, Tensor) and not values.ndim and len(output) == 1:
            values = values[None]  # of one image, the number alone
        if not isinstance(values, Tensor) or not values.ndim or len(values) != len(output) or values.is_complex():
            raise InputError(
                f"Expected a metric that returns a number for each image, [batch ...]: of an output "
                f"{list(output.shape)} it returned {shown(values)}."
            )
        values = values if values.is_floating_point() else values.float()  # of argmax, or of a comparison
        if single and values.ndim != 1:
            raise InputError(
                f"Expected a metric with one number for each image, [batch]: of an output {list(output.shape)} it "
                f"returned {shown(values)}. Choose one of them, or sum them."
            )
        return values

    return measure


def as_loss(model: HookedModel, metric: MetricLike) -> Metric:
    """Return the sum over images of a metric with one number for each, which gradients are taken of.

    Args:
        model, metric: as in ``as_metric``.

    Raises:
        UnknownName, InputError: as ``as_metric``; or the metric has several numbers for an image.
    """
    measure = as_metric(model, metric, single=True)
    return lambda output: measure(output).sum()


def class_of(model: Any, given: Class) -> int:
    """Return the index of a class given as index or label; an emoji before it, capitals and punctuation do not count.

    Raises:
        NotApplicable: the model has no labels.
        UnknownName: no such class.
        InputError: it is neither an index nor a label.
    """
    labels: tuple[str, ...] = getattr(model, "labels", None) or ()
    if (index := whole(given)) is not None:
        n = getattr(getattr(model, "spec", None), "n_classes", None) or len(labels)
        if index < 0 or (n and index >= n):
            raise UnknownName(f"No class {index}: they run from 0{f' to {n - 1}' if n else ''}.")
        return index
    if not isinstance(given, str):
        raise InputError(f"Expected a class, as index or label; got {shown(given)}.")
    if not labels:
        raise NotApplicable(f"This model has no labels, so {given!r} means no class: give its index, or a function.")
    alike = [at for at, label in enumerate(labels) if given == label or _words(given) == _words(label)]
    if len(alike) != 1:
        raise UnknownName(f"No class {given!r} among the model's {len(labels)} labels.{suggest(given, labels)}")
    return alike[0]


def _words(label: str) -> list[str]:
    return re.findall(r"\w+", label.casefold())
