"""Readers of arguments: one rule each for numbers, flags, devices, dtypes, paths and tensors, with one clear error.

They read the values that users give; the code after them relies on the types. Each raises an ``InputError`` that says
what was expected and what came.
"""

from __future__ import annotations

import inspect
import operator
import os
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from prisma_core.errors import HookError, InputError, PrismaError, suggest

_functorch = cast(Any, torch)._C._functorch

T = TypeVar("T")
LONGEST = 80  # letters of a value in a message
LARGEST = 1 << 24  # of a number of things that are made: more of them fit into no memory


def shown(value: Any) -> str:
    """Write a value short enough for a message: of a tensor or array its shape, of a long one its type.

    >>> shown(torch.zeros(2, 3)), shown([1, 2.5])
    ('a Tensor [2, 3] of torch.float32', '[1, 2.5]')
    """
    if isinstance(value, Tensor | np.ndarray):
        array = cast("Tensor", value)
        shape = "nested" if getattr(array, "is_nested", False) else list(array.shape)
        return f"a {type(array).__name__} {shape} of {array.dtype}"
    text = repr(value)
    return text if len(text) <= LONGEST and "\n" not in text else f"a value of type {type(value).__name__}"


def expect(value: object, kind: type[T] | tuple[type[T], ...], what: str, error: type[PrismaError] = InputError) -> T:
    """Return a value of the right type.

    Args:
        what: what is expected, for the message.

    Raises:
        InputError: it is of another type.
    """
    if isinstance(value, kind):
        return value
    raise error(f"Expected {what}, got {shown(value)}.")


def tensor(value: object, what: str) -> Tensor:
    """Return a tensor."""
    return expect(value, Tensor, f"{what}, a tensor")


def alive(x: Tensor) -> Tensor:
    """Return a tensor, unless it is of a ``torch.vmap`` that has ended."""
    if unwrapped(x) is not x and _functorch.maybe_get_level(x) > (_functorch.maybe_current_level() or 0):
        raise InputError(
            "This activation was made inside torch.vmap, which has ended: it belongs to one input there. Return it "
            "from the function, as in torch.vmap(lambda image: dict(model.run_with_cache(image[None])[1]))(images)."
        )
    return x


def check_eager() -> None:
    """Refuse to make a scope inside of what ``torch.compile`` or ``torch.export`` traces: it has no code for that."""
    if torch.compiler.is_dynamo_compiling():
        raise HookError(
            "Hooks and caches cannot be asked for inside of what is compiled or exported. Compile the model, and open "
            "the scope around it: with model.hooks(...): compiled(images)."
        )


def in_transform() -> bool:
    """Return whether a transform of ``torch.func`` is running, such as ``vmap``."""
    return _functorch.maybe_current_level() is not None


def unwrapped(x: Tensor) -> Tensor:
    """Return the tensor within those that transforms of ``torch.func`` put around it."""
    while not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def whole(value: object) -> int | None:
    """Return a whole number of Python's, numpy's or a tensor's as an int; None for anything else, truth values too.

    >>> whole(torch.tensor(3)), whole(3.0), whole(True)
    (3, None, None)
    """
    if type(value) is int:
        return value
    dtype = getattr(value, "dtype", None)
    if isinstance(value, bool | np.bool_) or dtype in (torch.bool, np.dtype(bool)) or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(cast("int", value))
    except (TypeError, RuntimeError):
        return None


def number(value: object, what: str, low: int | None = None, high: int | None = None) -> int:
    """Return a whole number, from ``low`` to ``high`` where these are given."""
    result = whole(value)
    if result is None or (low is not None and result < low) or (high is not None and result > high):
        least = "" if low is None else f" from {low} to {high}" if high is not None else f" of at least {low}"
        raise InputError(f"Expected {what} as a whole number{least}, got {shown(value)}.")
    return result


def sides(value: object, what: str) -> tuple[int, int]:
    """Return height and width, or rows and columns, of at least 1; one number stands for both."""
    expected = f"{what}, one whole number or two"
    pair = [value, value] if whole(value) is not None else several(value, expected)
    if len(pair) != 2:
        raise InputError(f"Expected {expected}, got {shown(value)}.")
    return number(pair[0], what, 1, LARGEST), number(pair[1], what, 1, LARGEST)


def check_flags(**flags: object) -> None:
    """Check that flags are truth values: where an argument before one is missing, another stands in its place."""
    for name, value in flags.items():
        expect(value, (bool, np.bool_), f"{name} to be True or False")


def several(value: Any, what: str) -> list[Any]:
    """Return the members of a collection in order, or of an array or tensor of one axis; at least one."""
    members: list[Any] = []
    if isinstance(value, Tensor | np.ndarray):
        members = cast("list[Any]", value.tolist()) if value.ndim == 1 else []
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | Set | Mapping):
        members = list(cast("Iterable[Any]", value))
    if not members:
        raise InputError(f"Expected {what}, got {shown(cast(Any, value))}.")
    return members


def choice(value: object, options: Iterable[str], what: str) -> str:
    """Return one of several words; for another the nearest are suggested."""
    words = list(options)
    if isinstance(value, str) and value in words:
        return value
    near = suggest(value, words) if isinstance(value, str) else ""
    *most, last = map(repr, words)
    raise InputError(f"Expected {what} {', '.join(most)} or {last}, got {shown(value)}.{near}")


def path_of(value: Any, what: str = "a path") -> Path:
    """Return a path; ``~`` at its beginning is the user's own folder.

    Raises:
        InputError: it is neither a text nor a path, empty, has a zero byte, is longer than the disk takes, or lies in a
            folder, or is one, in which nobody else may look.
    """
    if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        path = Path(os.path.expanduser(value))
        try:
            if path.is_dir():
                os.stat(f"{path}/.")  # whether what lies in it may be looked at
        except OSError as error:
            raise InputError(f"{what} cannot be {shown(str(value))}: {error.strerror}.") from error
        return path
    raise InputError(f"Expected {what}, such as 'results/cat', got {shown(value)}.")


def dtype_of(dtype: object) -> torch.dtype | None:
    """Return the floating point dtype of a name, such as ``float16``; a dtype comes back as it is, and None too."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is None or (isinstance(named, torch.dtype) and named.is_floating_point):
        return cast("torch.dtype | None", named)
    raise InputError(
        f"Expected a floating point dtype of torch's, such as torch.float16 or torch.bfloat16, got {shown(dtype)}."
    )


def device_of(device: object) -> torch.device | None:
    """Return a device that is there; None comes back."""
    if device is None:
        return None
    index = whole(device)
    try:
        if index is not None or isinstance(device, str | torch.device):
            return torch.empty(0, device=cast("str", device) if index is None else index).device
    except (RuntimeError, AssertionError, OverflowError, ValueError):  # torch's ways to say so
        pass
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    raise InputError(f"Expected a device of torch's, got {shown(device)}; there is {' and '.join(there)}.")


def check_call(function: object, n: int, what: str, expected: str, error: type[PrismaError] = InputError) -> None:
    """Check that a function takes ``n`` arguments by position; functions written in C pass, as only a call tells.

    Args:
        what: the name of the argument.
        expected: the call, as ``hook(activation, at)``.

    Raises:
        InputError: with the signature it has.
    """
    module = isinstance(function, nn.Module)
    if inspect.isclass(function) and issubclass(function, nn.Module):
        raise error(f"{what} is the class {function.__name__}; expected one of its objects, as {expected}.")
    if not callable(function) or (module and type(function).forward is nn.Module.forward):
        raise error(f"{what} is {shown(function)}; expected {expected}.")
    try:
        signature = inspect.signature(function.forward if module else function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*[None] * n)
    except TypeError as problem:
        name = getattr(function, "__name__", type(function).__name__)
        raise error(f"{what} is {name}{signature}; expected {expected}: {problem}.") from problem
