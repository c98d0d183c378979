"""Every error Prisma raises on purpose.

Each message says what was expected, what came, and what to do next.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import PurePath
from typing import TypeVar, cast

import torch
from pydantic import BaseModel, ValidationError

_MOST, _LONGEST = 5, 100  # fields, and letters of each, in a message
_LETTERS = 2_000  # of an error's own text
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Write control characters as escapes: they set a terminal's title, colours, clipboard, and the order of letters.

    >>> printable("a\tcat\x1b[2J")
    'a\tcat\\x1b[2J'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class PrismaError(Exception):
    """Base class: catching it catches every error Prisma raises on purpose.

    Its text steers no terminal, whatever names of a file stand in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


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
        advice = next((f". {way}" for package, way in WAYS_OUT.items() if module.startswith(package)), "")
        super().__init__(f"{module} is not supported: {feature}{advice}. Nothing was made, so no number is wrong.")


WAYS_OUT = {  # by where the classes are from that stand in the place of a library's own
    "peft.": "Merge what peft has added into the weights before: upstream = peft_model.merge_and_unload()",
    "torch._dynamo.": "Put what torch.compile wraps in its place before: wrapper._orig_mod",
    "torch.nn.parallel.": "Put what it wraps in its place before: wrapper.module",
    "torch.nn.utils.parametrize.": "Put plain values in the place of what computes them before: "
    "torch.nn.utils.parametrize.remove_parametrizations(module, name)",
    "torch.distributed.algorithms.": "Put what it wraps in its place before: wrapper._checkpoint_wrapped_module",
    **dict.fromkeys(("bitsandbytes.", "torchao.", "torch.ao."), "Quantised weights: adapt what they were made of"),
    **dict.fromkeys(("torch.distributed.", "torch.fx.", "torch.jit."), "Adapt what it was made of"),
}


class WeightMapError(PrismaError):
    """Upstream and canonical tensors do not account for each other."""


class NotApplicable(PrismaError):
    """A decomposition or rewrite that does not hold for this model."""


class MissingPart(NotApplicable, AttributeError):
    """An attribute of a part that this model lacks, such as ``W_gate`` where MLPs are not gated.

    ``hasattr`` is false then, and ``inspect.getmembers`` leaves the attribute out.
    """


class LoadError(PrismaError):
    """A model, file or checkpoint that cannot be read."""


class InputError(PrismaError):
    """An image or tensor that the model cannot take."""


class SpecError(InputError, ValueError):
    """Facts that make no spec: fields that are missing, unknown or out of range, or that contradict each other.

    Args:
        problem: what pydantic found; it is the error's ``__cause__`` too.
    """

    def __init__(self, problem: ValidationError):
        super().__init__(f"{problem.title} cannot be made: {format_fields(problem)}.")


class PluginError(PrismaError):
    """A plugin that failed to import or breaks the contract."""


def suggest(name: str, options: Iterable[str], n: int = 3) -> str:
    """Return a sentence that names the nearest options, or an empty string.

    >>> suggest("tim", ["timm", "toy"])
    ' Did you mean timm?'
    """
    names = list(options) if isinstance(cast("object", name), str) and len(name) < 2 * _LONGEST else []
    # Completions come first: by likeness alone a short beginning is far from every long name.
    lower = name.strip(" /:").lower() if names else ""
    completions = sorted((option for option in names if lower and option.lower().startswith(lower)), key=len)
    near = list(dict.fromkeys(completions + difflib.get_close_matches(name, names, n=n, cutoff=0.5)))[:n]
    return f" Did you mean {' or '.join(near)}?" if near else ""


# ------------------------------------------------------------ code of plugins

T = TypeVar("T")
_PASS = (PrismaError, torch.OutOfMemoryError, torch.AcceleratorError)  # the caller says what they mean


@contextmanager
def blaming(code: object, name: str = "", error: type[PrismaError] = PluginError) -> Generator[None]:
    """Turn what a plugin's code raises into one error that names its method, file and line.

    Prisma's own errors pass as they are::

        with blaming(adapter):
            spec = adapter.spec(reader)  # PluginError: acme.Adapter.spec raised KeyError: 'heads' (acme.py, line 12).

    Args:
        code: the plugin's object or function that the block calls.
        name: of the code, for the message; default the class of the object and the method that raised.
        error: the kind of error.
    """
    try:
        yield
    except (Exception, SystemExit) as problem:  # code that leaves the process would take the user's session with it
        if isinstance(problem, _PASS) and not isinstance(problem, SpecError):
            raise
        line = _line(problem, getattr(code, "__module__", "") or "")
        raise error(f"{name or _raiser(code, problem)} raised {format_error(problem)}{line}.") from problem


def returned(by: Callable[..., object] | str, value: object, kinds: type[T] | tuple[type[T], ...]) -> T:
    """Check the type of what a plugin's code returned, and return it.

    Args:
        by: the method, or a name for the message.
        kinds: the types that will do.

    Raises:
        PluginError: it is of another type.
    """
    if isinstance(value, kinds):
        return value
    types = kinds if isinstance(kinds, tuple) else (kinds,)
    expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
    name = by if isinstance(by, str) else f"{qualified_name(getattr(by, '__self__', by))}.{by.__name__}"
    raise PluginError(f"{name} returned {describe(value)}; expected {expected}.")


def qualified_name(value: object) -> str:
    """Name an object's type: ``package.module.Class``.

    >>> qualified_name(torch.nn.Linear(1, 1))
    'torch.nn.modules.linear.Linear'
    """
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def describe(value: object) -> str:
    """Name a value's kind: ``a str``, ``the class Linear``, ``None``."""
    if value is None:
        return "None"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def format_error(problem: BaseException) -> str:
    """Write an error on one line, cut where it is long."""
    if isinstance(problem, ValidationError):
        return f"a ValidationError of {problem.title}: {format_fields(problem)}"
    try:
        text = str(problem)
    except Exception as other:  # noqa: BLE001  # of any kind: the class is somebody's own
        text = f"(its text cannot be made: {type(other).__name__})"
    short = text if len(text) <= _LETTERS else f"{text[:_LETTERS]} (and more)"
    return " ".join(f"{type(problem).__name__}: {short}".split()).rstrip(".:")


def format_fields(problem: ValidationError) -> str:
    """List the first fields that are wrong, with the values that came, cut where they are long."""
    fields: list[str] = []
    for one in problem.errors(include_url=False)[:_MOST]:
        field, value = ".".join(map(str, one["loc"]))[:_LONGEST], one["input"]
        came = "" if isinstance(value, dict | list | BaseModel) else f", not {repr(value)[:_LONGEST]}"
        message = one["msg"].removeprefix("Value error, ")[: 2 * _LONGEST]
        fields.append(f"{f'{field}: ' if field else ''}{message}{came}")
    more = problem.error_count() - len(fields)
    return "; ".join([*fields, *([f"and {more} more"] if more else [])])


def _raiser(code: object, problem: BaseException) -> str:
    """Name the object's class, with the outermost of its methods that an error passed."""
    for frame, _ in traceback.walk_tb(problem.__traceback__):
        first, method = frame.f_code.co_varnames[:1], frame.f_code.co_name
        if first and frame.f_locals.get(first[0]) is code and hasattr(type(code), method):
            return f"{qualified_name(code)}.{method}"
    return qualified_name(code)


def _line(problem: BaseException, module: str) -> str:
    """Name the innermost line of a package's own code that an error passed; nothing where there is none."""
    package = module.partition(".")[0]
    lines = [
        f" ({PurePath(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(problem.__traceback__)
        if package and str(frame.f_globals.get("__name__", "")).partition(".")[0] == package
    ]
    return lines[-1] if lines else ""
