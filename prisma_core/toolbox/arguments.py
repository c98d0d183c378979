"""Arguments of public functions, read by their annotations: ``@checked``.

pydantic reads what an annotation allows. Each type in it is read by a rule of ours: numpy's and torch's numbers as
Python's, arrays of whole numbers as lists; models, tensors and other objects are passed on as they are. What stands in
no plain annotation (hook names, classes, images) is read by the one function that knows it.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, cast, get_args, get_origin, overload

import numpy as np
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from torch import Tensor

from prisma_core.errors import InputError
from prisma_core.errors.arguments import LARGEST, path_of, shown, whole
from prisma_core.hooks.cache import ActivationCache
from prisma_core.hooks.model import HookedModel
from prisma_core.spec.layout import TokenLayout
from prisma_core.toolbox.result import Result

P = ParamSpec("P")
T = TypeVar("T")
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Indices = Annotated[Sequence[int], Field(min_length=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


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
    def readers() -> dict[str, TypeAdapter[Any]]:
        scope = getattr(inspect.unwrap(function), "__globals__", {})
        return {name: TypeAdapter(_of_parameter(each, scope)) for name, each in signature.parameters.items()}

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # Python says it better
            return function(*args, **kwargs)
        for name, value in bound.arguments.items():
            try:
                bound.arguments[name] = readers()[name].validate_python(value)
            except ValidationError as error:
                raise InputError(f"{name_of} expected {name}{_expected(error, value)}.") from None
        return function(*bound.args, **bound.kwargs)

    return call


def _of_parameter(parameter: inspect.Parameter, scope: Mapping[str, Any]) -> Any:
    """Return the rule of a parameter; Any where its names are imported for type checkers alone."""
    hint = Any if parameter.annotation is parameter.empty else parameter.annotation
    try:
        rule = _rule(eval(hint, dict(scope)) if isinstance(hint, str) else hint)
    except (NameError, TypeError):
        return Any
    several = {parameter.VAR_POSITIONAL: tuple[rule, ...], parameter.VAR_KEYWORD: dict[str, rule]}
    return several.get(parameter.kind, rule)


# -------------------------------------------------------------------- the sentence

_PHRASES = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "too_short": "a list (at least {min_length})",
    "too_long": "a list (at most {max_length})",
    "missing": "given",
    "literal_error": "{expected}",
}


def _expected(error: ValidationError, value: object) -> str:
    """Say where in an argument the fault lies, what was expected there and what came.

    Of a union's options, those that went furthest into the value count: the others are of another kind.
    """
    faults = error.errors(include_url=False)
    deepest = max(faults, key=lambda each: len(each["loc"]))
    faults = [each for each in faults if len(each["loc"]) == len(deepest["loc"])]
    keys = cast("Mapping[object, object]", value) if isinstance(value, Mapping) else ()
    place = "".join(f"[{step!r}]" for step in deepest["loc"] if isinstance(step, int) or step in keys)
    # Python keeps one of the unions that are alike, in whichever order it met first: the sentence has one of its own.
    phrases = sorted({*map(_phrase, faults)}, key=lambda words: (words == "None", words))
    return f"{place}= to be {' or '.join(phrases)}; got {shown(deepest['input'])}"


def _phrase(fault: ErrorDetails) -> str:
    return _PHRASES.get(fault["type"], "{msg}").format(msg=fault["msg"], **fault.get("ctx", {}))


# -------------------------------------------------------------------- what pydantic reads


def _rule(hint: Any) -> Any:
    """Return an annotation with our rules in the place of its types; Any where anything goes."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[(_rule(args[0]), *args[1:])]
    if origin is Literal:
        return hint
    if origin in (Union, UnionType):
        options = tuple(_rule(each) for each in args if each is not str or Path not in args)  # a text is read as a path
        return Any if Any in options else Union[options]  # noqa: UP007
    if origin in (Sequence, list, tuple):
        each = tuple(arg if arg is ... else _rule(arg) for arg in args)
        return Annotated[tuple[each] if origin is tuple else Sequence[each], BeforeValidator(_members)]
    if origin in (Mapping, dict):
        return Annotated[dict[_rule(args[0]), _rule(args[1])], BeforeValidator(_RULES[Mapping])]
    kind = NoneType if hint is None else origin or hint
    if not isinstance(kind, type) or kind in (Any, object) or hasattr(kind, "dim_str"):
        return Any  # a type variable, the name of an alias; jaxtyping's shapes: who reads a tensor says more
    if issubclass(kind, HookedModel):
        kind = HookedModel  # a function says itself why it does not apply to a model of another kind
    bounds = kind if kind in (int, float) else Any  # what pydantic's Field bounds
    return Annotated[bounds, BeforeValidator(_RULES.get(kind) or _instance(cast(type, kind)))]


def _read(words: str, read: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return what pydantic calls for a value; the words say what is expected."""

    def validate(value: object) -> object:
        try:
            return read(value)
        except (TypeError, ValueError, RuntimeError, InputError) as error:
            reason = getattr(error.__cause__, "strerror", None)  # the disk's own
            raise PydanticCustomError(
                "expected", "{words}", {"words": f"{words} ({reason})" if reason else words}
            ) from None

    return validate


def _instance(kind: type, words: str = "", but: tuple[type, ...] = ()) -> Callable[[Any], object]:
    """Return the rule of a type; a class whose file was loaded once more, as notebooks do, is the same one."""

    def read(value: object) -> object:
        names = [(each.__module__, each.__qualname__) for each in type(value).__mro__]
        if isinstance(value, but) or not (isinstance(value, kind) or (kind.__module__, kind.__qualname__) in names):
            raise TypeError
        return value

    return _read(words or f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}", read)


def _bool(value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(cast("bool", value))


def _float(value: Any) -> float:
    if isinstance(value, bool | np.bool_ | str) or getattr(value, "ndim", 0) or not math.isfinite(float(value)):
        raise TypeError
    return float(value)


def _members(value: object) -> object:
    """Return a list or tuple of what is in a sequence, or in an array or tensor of one axis."""
    array = isinstance(value, Tensor | np.ndarray) and value.ndim == 1
    members = cast("Sequence[object]", _RULES[Sequence](cast("Tensor", value).tolist() if array else value))
    return list(members) if isinstance(members, list) else tuple(members)


_RULES: dict[Any, Callable[[Any], object]] = {
    int: _read("a whole number", lambda value: operator.index(cast("int", whole(value)))),
    float: _read("a number", _float),
    bool: _read("True or False", _bool),
    str: _instance(str, "a text"),
    Path: _read("a path that the disk takes", path_of),
    NoneType: _instance(NoneType, "None"),
    Sequence: _instance(Sequence, "a list", but=(str, bytes)),
    Mapping: _instance(Mapping, "a dictionary"),
    Iterable: _instance(Iterable, "several (a list, a loader)", but=(str, bytes, Mapping, Tensor, Result)),
    Callable: _instance(cast(type, Callable), "a function"),
    Tensor: _instance(Tensor, "a tensor"),
    HookedModel: _instance(HookedModel, "a model, as prisma.load and prisma.adapt return"),
    ActivationCache: _instance(ActivationCache, "a cache, as model.run_with_cache returns"),
    TokenLayout: _instance(TokenLayout, "a layout of tokens, as model.layout"),
    Result: _instance(Result, "the Result of a technique"),
}
