"""What a model takes, made of what a user has: tensors, images in any form, texts; one hook point; batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias, cast

from torch import Tensor

from prisma_core import ActivationCache, HookedDual, HookedModel, HookedText, InputError, UnknownName
from prisma_core.plugin import LayerQuery, Query, resolve_one, shown

Inputs: TypeAlias = tuple[Tensor, ...]
TOKEN_AXES = ("pos", "query_pos", "patch", "window", "row", "column")
"""The axes of an activation along which tokens lie."""


def vision_of(model: HookedModel) -> HookedModel:
    """Return the vision tower of a dual encoder, and any other model as it is."""
    return model.vision if isinstance(model, HookedDual) else model


def as_inputs(model: HookedModel, given: Any) -> Inputs:
    """Return a model's inputs as a tuple: images alone, or images and tokens of a dual encoder.

    Args:
        model: the model.
        given: images in any form (see ``as_input``); for a dual encoder ``(images, texts)``.

    Raises:
        InputError: it is nothing that the model takes, or there is none of it.
    """
    if isinstance(given, tuple) and given and all(isinstance(each, Tensor) for each in given):
        return tuple(as_input(model, each) for each in cast("Inputs", given))
    if isinstance(model, HookedDual) and isinstance(given, tuple) and len(given) == 2:
        return as_input(model.vision, given[0]), as_input(model.text, given[1])
    return (as_input(model, given),)


def as_input(model: HookedModel, given: Any) -> Tensor:
    """Return images, or tokens of texts, as the tensor that a model takes.

    Args:
        model: the model.
        given: a tensor; or what ``model.preprocess`` reads (paths, Pillow images, arrays, lists of them), of a text
            tower texts.

    Raises:
        InputError: it is nothing that the model takes, or there is none of it.
    """
    x = given
    if isinstance(given, ActivationCache):
        raise InputError(f"Expected images or texts, which this runs itself, got {given!r}.")
    if not isinstance(given, Tensor):
        if isinstance(model, HookedText):
            x = model.tokens(given)
        else:
            x = cast(Tensor, cast(Any, model).preprocess(given)).to(cast(Any, model).input_like)
    if not x.ndim or not len(x):
        raise InputError(f"Expected inputs [batch ...] of at least one image or text, got {shown(x)}.")
    return x


def as_batches(data: Any) -> Iterator[tuple[Any, Tensor | None]]:
    """Yield batches with their labels, or None: of one tensor, of tensors, of pairs ``(images, labels)``.

    Raises:
        InputError: a batch is none of these.
    """
    for item in cast("Iterable[Any]", [data] if isinstance(data, Tensor) else data):
        if isinstance(item, Tensor):
            yield item, None
        elif isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(each, Tensor) for each in item):  # pyright: ignore[reportUnknownVariableType]
            yield item[0], item[1]
        else:
            raise InputError(f"Expected batches of images, or pairs (images, labels) of tensors; got {shown(item)}.")


def points_of(model: HookedModel, at: Query | None) -> list[str]:
    """Return the full names of the hook points that are meant: at least one.

    Raises:
        UnknownName: there is none.
    """
    if not (names := model.resolve(at)):
        raise UnknownName(f"Expected at least one hook point, got {shown(at)}.")
    return names


def one_point(model: HookedModel, at: str | LayerQuery) -> str:
    """Return the full name of the one hook point that is meant by a function's ``at=``.

    Raises:
        UnknownName: there is none, or there are several; with a name for one of them.
    """
    try:
        return resolve_one(at, list(model.hook_points()))
    except UnknownName as error:
        raise UnknownName(f"{error} The argument at= says which hook point is meant.") from None
