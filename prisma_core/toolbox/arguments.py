"""Arguments of public functions, read by their annotations: ``@checked``.

An annotation says what an argument may be; where it is checked, it also says so to the user. numpy's and torch's
numbers are read as Python's, and arrays of whole numbers as lists. What stands in no plain annotation (hook names,
classes, images) is read by the one function that knows it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin, overload

import numpy as np
from pydantic import Field
from torch import Tensor

from prisma_core.errors import InputError
from prisma_core.errors.arguments import LARGEST, path_of, shown, whole
from prisma_core.hooks.cache import ActivationCache
from prisma_core.hooks.model import HookedModel
from prisma_core.spec.layout import TokenLayout
from prisma_core.toolbox.result import Result

P = ParamSpec("P")
T = TypeVar("T")
Read = Callable[[object], object]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Indices = Annotated[Sequence[int], Field(min_length=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

_SOURCES = {
    HookedModel: "a model, as prisma.load and prisma.adapt return",
    ActivationCache: "a cache, as model.run_with_cache returns",
    TokenLayout: "a layout of tokens, as model.layout",
    Result: "the Result of a technique",
    Tensor: "a tensor",
    bool: "True or False",
    str: "a text",
    int: "a whole number",
    float: "a number",
    slice: "a slice",
    Path: "a path",
    NoneType: "None",
}


class _Mismatch(Exception):
    """A value that an annotation does not allow."""


@dataclass(frozen=True)
class _Reader:
    """What an annotation allows, in words, and what reads it."""

    words: str
    read: Read


@overload
def checked(function: type[T]) -> type[T]: ...
@overload
def checked(function: Callable[P, T]) -> Callable[P, T]: ...
def checked(function: Any) -> Any:
    """Check the arguments of a function, or of a class that is made, against its annotations before it runs.

    Raises:
        InputError: one is of another type or out of range; with what was expected.

    >>> from prisma_core.toolbox.options import Whole
    >>> @checked
    ... def top(values: Tensor, k: Whole | None = None): ...
    >>> top([1.0, 2.0])
    Traceback (most recent call last):
    prisma_core.errors.InputError: top expected values= to be a tensor; got [1.0, 2.0].
    """
    if inspect.isclass(function):
        function.__init__ = checked(function.__init__)
        return function
    signature, name_of = inspect.signature(function), function.__qualname__.removesuffix(".__init__")

    @cache
    def readers() -> dict[str, _Reader]:
        scope = getattr(inspect.unwrap(function), "__globals__", {})
        return {
            name: reader
            for name, parameter in signature.parameters.items()
            if parameter.annotation is not parameter.empty
            and (reader := _reader(_evaluated(parameter.annotation, scope))) is not None
        }

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # Python says it better
            return function(*args, **kwargs)
        for name, value in bound.arguments.items():
            if (reader := readers().get(name)) is None:
                continue
            kind = signature.parameters[name].kind
            try:
                if kind is inspect.Parameter.VAR_POSITIONAL:
                    bound.arguments[name] = tuple(reader.read(each) for each in value)
                elif kind is inspect.Parameter.VAR_KEYWORD:
                    bound.arguments[name] = {key: reader.read(each) for key, each in value.items()}
                else:
                    bound.arguments[name] = reader.read(value)
            except _Mismatch:
                raise InputError(f"{name_of} expected {name}= to be {reader.words}; got {shown(value)}.") from None
        return function(*bound.args, **bound.kwargs)

    return call


def _evaluated(annotation: object, scope: Mapping[str, Any]) -> object:
    """Return an annotation as an object; Any where its names are imported for type checkers alone."""
    try:
        return eval(annotation, dict(scope)) if isinstance(annotation, str) else annotation
    except (NameError, TypeError):
        return Any


def _reader(hint: object) -> _Reader | None:
    """Return the reader of an annotation, or None where anything goes."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is None:
        hint = NoneType
    if origin is Annotated:
        return _bounded(hint)
    if origin is Literal:
        return _Reader(_either([repr(each) for each in args]), lambda value: _one_of(value, args))
    if origin in (Union, UnionType):
        if str in args and Path in args:  # read as a path
            args = tuple(each for each in args if each is not str)
        options = [_reader(each) for each in args]
        return None if None in options else _first_of(cast("list[_Reader]", options))
    if origin in _COLLECTIONS:
        return _COLLECTIONS[origin](origin, args)
    kind = cast(Any, origin or hint)
    if not isinstance(kind, type) or kind in (Any, object) or hasattr(kind, "dim_str"):
        return None  # Any, a type variable, the name of an alias; jaxtyping's shapes: who reads a tensor says more
    if issubclass(kind, HookedModel):
        kind = HookedModel  # a function says itself why it does not apply to a model of another kind
    exact = cast(type, kind)
    return _Reader(_words(exact), _READ.get(exact, lambda value: _instance(value, exact)))


def _words(kind: type) -> str:
    """Name the values of a type."""
    return _SOURCES.get(kind) or f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _instance(value: object, kind: type) -> object:
    """Check a type; a class whose file was loaded once more, as notebooks do, is the same one."""
    name = (kind.__module__, kind.__qualname__)
    if isinstance(value, kind) or any((each.__module__, each.__qualname__) == name for each in type(value).__mro__):
        return value
    raise _Mismatch


def _one_of(value: object, options: Sequence[object]) -> object:
    if not any(type(value) is type(each) and value == each for each in options):
        raise _Mismatch
    return value


def _first_of(options: list[_Reader]) -> _Reader:
    def read(value: object) -> object:
        for option in options:
            try:
                return option.read(value)
            except _Mismatch:
                continue
        raise _Mismatch

    return _Reader(_either([option.words for option in options]), read)


# -------------------------------------------------------------------- plain values


def _whole(value: object) -> int:
    if (number := whole(value)) is None:
        raise _Mismatch
    return number


def _float(value: object) -> float:
    if isinstance(value, bool | np.bool_ | str) or getattr(value, "ndim", 0):
        raise _Mismatch
    try:
        number = float(cast("float", value))
    except (TypeError, ValueError, RuntimeError):
        raise _Mismatch from None
    if not math.isfinite(number):
        raise _Mismatch
    return number


def _bool(value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _Mismatch
    return bool(cast("bool", value))


def _path(value: object) -> Path:
    try:
        return path_of(value)
    except InputError:
        raise _Mismatch from None


_READ: dict[object, Read] = {int: _whole, float: _float, bool: _bool, Path: _path}


# -------------------------------------------------------------------- bounds and collections


def _bounded(hint: object) -> _Reader | None:
    """Return the reader of ``Annotated[int, Field(ge=1)]`` and the like."""
    inner, *metadata = get_args(hint)
    if (reader := _reader(inner)) is None:
        return None
    rules = [rule for each in metadata for rule in getattr(each, "metadata", [each])]
    bounds = [
        (words, holds, bound)
        for name, (words, holds) in _BOUNDS.items()
        for rule in rules
        if (bound := getattr(rule, name, None)) is not None
    ]

    def read(value: object) -> object:
        result = reader.read(value)
        if not all(holds(result, bound) for _, holds, bound in bounds):
            raise _Mismatch
        return result

    limits = " and ".join(words.format(bound) for words, _, bound in bounds)
    return _Reader(f"{reader.words} {limits}".strip(), read)


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("of at least {}", lambda value, bound: value >= bound),
    "gt": ("above {}", lambda value, bound: value > bound),
    "le": ("of at most {}", lambda value, bound: value <= bound),
    "lt": ("below {}", lambda value, bound: value < bound),
    "min_length": ("(at least {})", lambda value, bound: len(value) >= bound),
}


def _sequence(origin: Any, args: Sequence[Any]) -> _Reader:
    fixed = origin is tuple and args[-1] is not ...
    each = [_reader(arg) for arg in (args if fixed else args[:1])]

    def read(value: object) -> object:
        if isinstance(value, Tensor | np.ndarray) and origin is not tuple and value.ndim == 1:
            value = cast("list[object]", value.tolist())
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise _Mismatch
        values = cast("Sequence[object]", value)
        if fixed and len(values) != len(each):
            raise _Mismatch
        readers = each if fixed else each * len(values)
        results = [one if reader is None else reader.read(one) for reader, one in zip(readers, values, strict=True)]
        return results if isinstance(value, list) else tuple(results)

    words = [one.words if one else "anything" for one in each]
    return _Reader(f"({', '.join(words)})" if fixed else f"a list, each {words[0]}", read)


def _iterable(origin: Any, args: Sequence[Any]) -> _Reader:
    """Values that come one by one: what each is shows when it comes."""
    each = _reader(args[0]) if args else None

    def read(value: object) -> object:
        if isinstance(value, str | bytes | Mapping | Tensor | Result) or not isinstance(value, origin):
            raise _Mismatch
        return value

    return _Reader(f"several (a list, a loader), each {each.words}" if each else "several (a list, a loader)", read)


def _mapping(origin: Any, args: Sequence[Any]) -> _Reader:
    key, one = (_reader(arg) for arg in args)

    def read(value: object) -> object:
        if not isinstance(value, Mapping):
            raise _Mismatch
        items = cast("Mapping[object, object]", value).items()
        return {key.read(k) if key else k: one.read(v) if one else v for k, v in items}

    words = [reader.words if reader else "anything" for reader in (key, one)]
    return _Reader(f"a dictionary of {words[0]} to {words[1]}", read)


def _function(origin: Any, args: Sequence[Any]) -> _Reader:
    def read(value: object) -> object:
        if not callable(value):
            raise _Mismatch
        return value

    return _Reader("a function", read)


_COLLECTIONS: dict[object, Callable[[Any, Sequence[Any]], _Reader]] = {
    Sequence: _sequence,
    list: _sequence,
    tuple: _sequence,
    Iterable: _iterable,
    Mapping: _mapping,
    dict: _mapping,
    Callable: _function,
}
