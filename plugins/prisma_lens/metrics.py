"""Inputs and metrics: what a model takes, the tower that sees it, and a number for each image from what it returns."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from prisma_core import HookedDual, HookedModel, InputError, NotApplicable, UnknownName
from prisma_core.plugin import suggest

Inputs: TypeAlias = "tuple[Tensor, ...]"
Metric: TypeAlias = Callable[[Tensor], Tensor]
Class: TypeAlias = "int | str"
MetricLike: TypeAlias = "Metric | Class | tuple[Class, Class]"


def as_inputs(given: Tensor | Inputs) -> Inputs:
    """Return a model's inputs as a tuple: images alone, or images and tokens of a dual encoder."""
    return (given,) if isinstance(given, Tensor) else tuple(given)


def vision_of(model: HookedModel) -> HookedModel:
    """Return the vision tower of a dual encoder, and any other model as it is."""
    return model.vision if isinstance(model, HookedDual) else model


def logit(which: int) -> Metric:
    """Return the metric ``logits[which]``: ``[batch class] -> [batch]``."""
    return lambda logits: logits[:, which]


def logit_difference(higher: int, lower: int) -> Metric:
    """Return the metric ``logits[higher] - logits[lower]``: ``[batch class] -> [batch]``."""
    return lambda logits: logits[:, higher] - logits[:, lower]


def as_metric(model: Any, metric: MetricLike) -> Metric:
    """Return a metric as a function.

    Args:
        model: the model whose labels name the classes.
        metric: a function of the model's output with a number for each image ``[batch]`` or several ``[batch ...]``; or
            a class, as index or label, for its logit; or two classes, for the difference of their logits.

    Raises:
        UnknownName: no such class; the nearest are suggested.
        InputError: it is none of these.
    """
    if callable(metric):
        return metric
    if isinstance(metric, int | str):
        return logit(class_of(model, metric))
    if isinstance(metric, tuple) and len(metric) == 2:
        return logit_difference(*(class_of(model, each) for each in metric))
    raise InputError(
        f"Expected a metric: a function of the logits, a class (index or label), or two classes for their difference; "
        f"got {metric!r:.60}."
    )


def class_of(model: Any, given: Class) -> int:
    """Return the index of a class given as index or label; an emoji before it, capitals and punctuation do not count.

    Raises:
        NotApplicable: the model has no labels.
        UnknownName: no such class.
    """
    labels: tuple[str, ...] = getattr(model, "labels", None) or ()
    if isinstance(given, int):
        n = getattr(getattr(model, "spec", None), "n_classes", None) or len(labels)
        if n and not -n <= given < n:
            raise UnknownName(f"No class {given}: they run from 0 to {n - 1}.")
        return given
    if not labels:
        raise NotApplicable(f"This model has no labels, so {given!r} means no class: give its index, or a function.")
    alike = [at for at, label in enumerate(labels) if given == label or _words(given) == _words(label)]
    if len(alike) != 1:
        raise UnknownName(f"No class {given!r} among the model's {len(labels)} labels.{suggest(given, labels)}")
    return alike[0]


def _words(label: str) -> list[str]:
    return re.findall(r"\w+", label.casefold())
