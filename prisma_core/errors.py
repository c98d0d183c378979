"""Every error Prisma raises on purpose.

Each message says what was expected, what came, and what to do next.
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError


class PrismaError(Exception):
    """Base class: catching it catches every error Prisma raises on purpose."""


class UnknownName(PrismaError):
    """A hook point, source, model, plugin or label that does not exist."""


class HookError(PrismaError):
    """A hook that cannot run as asked, or returned something unusable."""


class UnsupportedArchitecture(PrismaError):
    """An upstream fact that the canonical transformer cannot represent.

    Args:
        module: qualified name of the upstream module that holds the fact.
        feature: the feature itself, in the field's words.
    """

    def __init__(self, module: str, feature: str):
        self.module = module
        self.feature = feature
        super().__init__(f"{module} is not supported: {feature}. Nothing was made, so no number is wrong.")


class WeightMapError(PrismaError):
    """Upstream and canonical tensors do not account for each other."""


class NotApplicable(PrismaError):
    """A decomposition or rewrite that does not hold for this model."""


class LoadError(PrismaError):
    """A model, file or checkpoint that cannot be read."""


class InputError(PrismaError):
    """A picture or tensor that the model cannot take."""


class PluginError(PrismaError):
    """A plugin that failed to import or breaks the contract."""


def suggest(name: str, options: Iterable[str], n: int = 3) -> str:
    """Return a sentence that names the nearest options, or an empty string.

    >>> suggest("tim", ["timm", "toy"])
    ' Did you mean timm?'
    """
    given = list(options)
    # What is being typed comes first: by likeness alone a short beginning is far from every long name.
    begun = sorted((option for option in given if name and option.startswith(name)), key=len)
    near = list(dict.fromkeys(begun + difflib.get_close_matches(name, given, n=n, cutoff=0.5)))[:n]
    return f" Did you mean {' or '.join(near)}?" if near else ""


# ------------------------------------------------------------ code of plugins

T = TypeVar("T")
_OURS = (PrismaError, torch.OutOfMemoryError, torch.AcceleratorError)  # who calls says what they mean


@contextmanager
def blamed(name: str, error: Callable[[str], PrismaError] = PluginError, package: str = "") -> Generator[None]:
    """Turn what foreign code raises into one error that names it.

    Args:
        name: of that code, as its author knows it.
        error: what is raised instead.
        package: the package of that code: the innermost line in it is named too.
    """
    try:
        yield
    except _OURS:
        raise
    except Exception as problem:
        where = _line(problem, package)
        raise error(f"{name} raised {told(problem)}{f' ({where})' if where else ''}.") from problem


def called(
    name: str, function: Callable[..., object], *given: Any, gives: type[T] | tuple[type[T], ...], **options: Any
) -> T:
    """Call what a plugin wrote, and return what it gives.

    Args:
        gives: what it must be an instance of.

    Raises:
        PluginError: it raised something that is no error of Prisma's, or gave something else.
    """
    with blamed(name, package=getattr(function, "__module__", "") or ""):
        made = function(*given, **options)
    if not isinstance(made, gives):
        kinds = gives if isinstance(gives, tuple) else (gives,)
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise PluginError(f"{name} returned {_kind(made)}; expected {wanted}.")
    return made


def ask(whose: object, method: str, *given: Any, gives: type[T] | tuple[type[T], ...], **options: Any) -> T:
    """Call a method of an object that a plugin made (see ``called``)."""
    kind = type(whose)
    name = f"{kind.__module__}.{kind.__qualname__}.{method}"
    return called(name, getattr(whose, method), *given, gives=gives, **options)


def told(problem: BaseException) -> str:
    """Return an error in one line."""
    if isinstance(problem, ValidationError):
        return f"a ValidationError of {problem.title}: {fields_told(problem)}"
    return " ".join(f"{type(problem).__name__}: {problem}".split()).rstrip(".")


def fields_told(problem: ValidationError) -> str:
    """Return which fields are wrong, and what came where that is short."""
    said: list[str] = []
    for one in problem.errors(include_url=False):
        field, came = ".".join(map(str, one["loc"])), one["input"]
        short = "" if isinstance(came, dict | list | BaseModel) else f", not {came!r}"
        said.append(f"{f'{field}: ' if field else ''}{one['msg'].removeprefix('Value error, ')}{short}")
    return "; ".join(said)


def _kind(value: object) -> str:
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _line(problem: BaseException, package: str) -> str:
    """Return the innermost line of a package's own code that an error passed; none where its source is not at hand."""
    top = package.partition(".")[0]
    passed = [
        f"{PurePath(frame.f_code.co_filename).name}, line {line}"
        for frame, line in traceback.walk_tb(problem.__traceback__)
        if top and str(frame.f_globals.get("__name__", "")).partition(".")[0] == top
    ]
    return passed[-1] if passed else ""
