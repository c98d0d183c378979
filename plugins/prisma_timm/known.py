"""Which of timm's architectures an adapter takes, found out without building each."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast
from unittest import mock

import timm
import torch
from timm.models import build_model_with_cfg  # pyright: ignore[reportUnknownVariableType]

from prisma_core.errors import InputError
from prisma_core.hooks.keywords import check_keywords, keywords, named
from prisma_core.plugin.adapter import Adapter
from prisma_timm.cases import WithoutData, case

BUILDER = "build_model_with_cfg"  # what timm's entry points hand a class and its arguments to
FEATURES = ("features_only", "out_indices")  # what every builder takes besides its own arguments
UNREAD = {"pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_strict", "feature_cfg"}


class _Blueprint(BaseException):
    """Carries what would have been built; nothing between an entry point and us may catch it."""

    def __init__(self, kind: type, arguments: dict[str, Any]):
        super().__init__()
        self.kind = kind
        self.arguments = arguments


def loadable(names: Collection[str], adapters: Mapping[str, Adapter]) -> set[str]:
    """Return those of timm's architectures that one of the adapters, given by the types they take, can represent.

    Architectures of one class whose arguments differ in numbers alone are alike: one of them is built, without data.
    """
    answers: dict[object, bool] = {}
    found: set[str] = set()
    for name, blueprint in _blueprints(names):
        kind = None if blueprint is None else f"{blueprint.kind.__module__}.{blueprint.kind.__qualname__}"
        if kind is not None and kind not in adapters:
            continue
        alike = name if blueprint is None else (kind, _without_numbers(blueprint.arguments))
        if alike not in answers:
            answers[alike] = case(name, adapters) is not None
        if answers[alike]:
            found.add(name)
    return found


def _blueprints(
    names: Collection[str], options: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, _Blueprint | None]]:
    """Yield for each architecture what its entry point would build; None where it builds in its own way."""
    modules = {module: sys.modules[f"timm.models.{module}"] for module in timm.list_modules()}
    for name in names:
        entry = timm.model_entrypoint(name)
        with ExitStack() as stack:
            for module in modules.values():
                if entry.__module__ == module.__name__ and hasattr(module, BUILDER):
                    stack.enter_context(mock.patch.object(module, BUILDER, _drawn(getattr(module, BUILDER))))
                    break
            else:
                yield name, None
                continue
            try:
                with torch.device("meta"), WithoutData():  # some entry points build a stem first
                    entry(pretrained=False, **(options or {}))
            except _Blueprint as blueprint:
                drawn = blueprint
            else:
                drawn = None
        yield name, drawn


def _drawn(build: Callable[..., Any]) -> Callable[..., Any]:
    here = threading.get_ident()  # other threads go on building

    def draw(kind: type, *names: Any, **arguments: Any) -> Any:
        if threading.get_ident() != here:
            return build(kind, *names, **arguments)
        raise _Blueprint(kind, {name: value for name, value in arguments.items() if name not in UNREAD})

    return draw


def _without_numbers(value: Any) -> object:
    """Return arguments with each number by its type, and whether it is nothing, alone."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return type(value), value == 0
    if isinstance(value, Mapping):
        parts = cast("Mapping[object, object]", value).items()
        return tuple(sorted((str(name), repr(_without_numbers(part))) for name, part in parts))
    if isinstance(value, list | tuple):
        return tuple(repr(_without_numbers(part)) for part in cast("Sequence[object]", value))
    return repr(value)


def check_options(reference: str, options: Mapping[str, Any]) -> None:
    """Refuse options that neither timm's builders nor the class of an architecture takes, before anything is fetched.

    Raises:
        InputError: with the nearest there are.
    """
    name = reference.partition(".")[0]
    ours = set(named(timm.create_model))
    try:
        ((_, blueprint),) = _blueprints([name], {key: value for key, value in options.items() if key not in ours})
    except TypeError as error:
        raise InputError(f"timm:{name} takes no such options ({', '.join(options)}): {error}.") from error
    if blueprint is None:
        return
    taken = keywords(blueprint.kind)  # None where the class takes anything
    if taken is not None:
        builders = [*named(timm.create_model), *named(cast("Callable[..., Any]", build_model_with_cfg))]
        left = [key for key in options if key in ours or key in blueprint.arguments]  # the rest an entry point took
        check_keywords(f"timm:{name}", left, ["pretrained", *taken, *builders, *FEATURES])
