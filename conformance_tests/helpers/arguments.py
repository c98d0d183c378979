"""Nonsense as each argument of a call that works, all others valid: an error of Prisma's, or a result that is listed.

A test module lists its calls by name, and gives each argument of each a test of its own::

    CALLS = {"pick": Call(pick, image, names="z", takes={"names": "None ''"})}

    @pytest.mark.parametrize("name, argument", cases(CALLS))
    def test_nonsense(name, argument):
        assert not faults(CALLS[name], argument)
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from prisma_core import PrismaError

# By the word that stands for it in ``Call.takes``: each call gets a fresh one.
NONSENSE: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "3.5": lambda: 3.5,
    "nan": lambda: float("nan"),
    "-99": lambda: -99,
    "10**18": lambda: 10**18,
    "10**30": lambda: 10**30,  # of more than 64 bits
    "''": lambda: "",
    "nonsense": lambda: "nonsense",
    "[]": lambda: [],
    "[1,2.5]": lambda: [1, 2.5],
    "object": object,
    "b'x'": lambda: b"x",
    "{}": dict,
    "set()": set,
    "int64": lambda: np.int64(3),
    "array": lambda: np.array([]),
    "tensor": lambda: torch.tensor(3.0),
    "module": nn.Module,
    "Path": lambda: Path("/dev/null/nonexistent"),
    "lambda": lambda: lambda one, two, three: None,
}
ANYTHING = " ".join(NONSENSE)  # an argument that is kept or passed on, whatever it is

# What arguments of a name take, whichever function has them; with their annotations, numpy's numbers and None.
ANY_TEXT = "'' nonsense"
TAKES = {"seed": "-99 10**18", "lr": "3.5 tensor 10**18", "folder": "nonsense", "path": "nonsense", "title": ANY_TEXT}
NUMBER = re.compile(r"\b(int|Count|Natural|Seed|Indices|Above|Registers)\b")
NUMBERS = ("pos", "queries", "keys")


@dataclass(frozen=True)
class Call:
    """A call that works.

    Attributes:
        function: what is called.
        arguments, keywords: with what.
        takes: by argument, the words of the nonsense that it takes, separated by blanks: each listed value must be
            taken, every other be refused.
        then: what is done with the result: entering a scope, reading an iterator. Its errors count.
        raises: the errors that are in words.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    takes: Mapping[str, str] = field(default_factory=dict[str, str])
    then: Callable[[Any], Any] = lambda result: result
    raises: type[Exception] | tuple[type[Exception], ...] = PrismaError

    def names(self) -> list[str]:
        """Return the arguments there are."""
        parameters = inspect.signature(self.function).parameters.values()
        return [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]

    def listed(self, argument: str) -> set[str]:
        """Return the words of the nonsense that an argument takes; a flag takes True."""
        flag = inspect.signature(self.function).parameters[argument].annotation in ("bool", bool)
        words = set(self.takes.get(argument, "True" if flag else "").split())
        return words | ({"10**30"} if "10**18" in words and argument != "seed" else set())

    def run(self, **replaced: Any) -> Any:
        """Call with some arguments replaced."""
        signature = inspect.signature(self.function)
        bound = signature.bind(*self.arguments, **self.keywords)
        for name, value in replaced.items():
            several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            bound.arguments[name] = (value,) if several else value
        # A later argument by position needs the ones before it: Python fills in their defaults.
        bound.apply_defaults()
        return self.then(self.function(*bound.args, **bound.kwargs))


def call(
    function: Callable[..., Any],
    *arguments: Any,
    takes: Mapping[str, str] | None = None,
    then: Callable[[Any], Any] | None = None,
    raises: type[Exception] | tuple[type[Exception], ...] = PrismaError,
    **keywords: Any,
) -> Call:
    """Return a call of a function with these arguments."""
    one = Call(function, arguments, keywords, takes or {}, raises=raises)
    return one if then is None else replace(one, then=then)


def cases(calls: Mapping[str, Call]) -> list[tuple[str, str]]:
    """Return every argument of every call: ``(name of the call, name of the argument)``."""
    return [(name, argument) for name, each in calls.items() for argument in each.names()]


def faults(one: Call, argument: str) -> list[str]:
    """Return what is wrong with the answers to nonsense in the place of an argument.

    Wrong are: an error that is none of Prisma's, one that says nothing of what came, a value that is taken and not
    listed, a listed one that is refused.
    """
    wrong: list[str] = []
    listed = one.listed(argument)
    assert listed <= set(NONSENSE), f"no such nonsense: {listed - set(NONSENSE)}"
    for word, make in NONSENSE.items():
        value = make()
        try:
            result = one.run(**{argument: value})
        except one.raises as error:
            if word in listed:
                wrong.append(f"{argument}={word} is listed and refused: {error}")
            elif not says(str(error), value):
                wrong.append(f"{argument}={word}: the error does not say what came: {error}")
        except Exception as error:  # noqa: BLE001 any other error is a fault
            wrong.append(f"{argument}={word} raised {type(error).__name__}: {str(error)[:200]}")
        else:
            if word not in listed:
                wrong.append(f"{argument}={word} is taken in silence: {str(result)[:80]}")
    return wrong


def with_plain(one: Call, argument: str) -> Call:
    """Add what an argument of this name, annotation and default takes everywhere."""
    if argument in one.takes:
        return one
    parameter = inspect.signature(one.function).parameters[argument]
    words = TAKES.get(argument, "")
    words += " None" if parameter.default is None else ""
    words += " int64" if NUMBER.search(str(parameter.annotation)) or argument in NUMBERS else ""
    words += " True" if "bool" in str(parameter.annotation) else ""
    return replace(one, takes={**one.takes, argument: words})


def all_faults(one: Call) -> dict[str, list[str]]:
    """Return what is wrong with the answers to nonsense, by argument; plain values are taken (see ``with_plain``)."""
    wrong = {argument: faults(with_plain(one, argument), argument) for argument in one.names()}
    return {argument: each for argument, each in wrong.items() if each}


def says(message: str, value: object) -> bool:
    """Return whether a message names a value: as Python writes it, by its type, its parts or its size."""
    if value is None:
        return True
    forms = [repr(value), str(value) or "'.'", type(value).__name__, getattr(value, "__name__", repr(value)), "both"]
    forms += [str(float(value))] if type(value) is int else []
    forms += [str(list(value.shape))] if isinstance(value, torch.Tensor) else []
    if isinstance(value, list | dict | set | bytes | np.ndarray):
        forms += [repr(each) for each in value] if len(value) else ["no ", "empty", "()", "[0]", " 0 ", "at least one"]
    return any(form in message for form in forms)


def public_callables(module: ModuleType, kinds: Iterable[type] = ()) -> dict[str, Callable[..., Any]]:
    """Return a module's public functions, and the methods of its public classes and of others, by qualified name.

    Methods are those that Prisma defines and that take arguments, inherited ones once. Errors, abstract methods and
    what other libraries bring are left out.
    """
    public = [getattr(module, name) for name in module.__all__]
    classes = [each for each in public if inspect.isclass(each) and not issubclass(each, Exception)]
    functions = [each for each in public if not inspect.isclass(each)]
    for kind in (*classes, *kinds):
        for name in dir(kind):
            method = inspect.getattr_static(kind, name)
            function = getattr(method, "__func__", method)
            if not name.startswith("_") and len(_parameters(function)) > (not isinstance(method, staticmethod)):
                functions.append(function)
    named = [each for each in functions if inspect.isfunction(each) and not hasattr(each, "__isabstractmethod__")]
    return {each.__qualname__: each for each in named if each.__module__.startswith("prisma_")}


def uncalled(modules: Iterable[ModuleType], calls: Iterable[Call], exempt: Mapping[str, str]) -> list[str]:
    """Return the public functions, methods and classes of packages that no call tries and no reason exempts.

    Of classes it is what makes one: exceptions aside, and pydantic's, whose fields ``test_spec_errors.py`` tries.
    A name that is exempt and called, or no public one, comes back as well.
    """
    called = {inspect.unwrap(getattr(each.function, "__func__", each.function)) for each in calls}
    missing: dict[str, bool] = {}
    for module in modules:
        package = module.__name__
        for name, function in public_callables(module).items():
            if function.__module__.startswith(package):
                missing[f"{package}.{name}"] = inspect.unwrap(function) not in called
        for name in module.__all__:
            kind = getattr(module, name)
            made = inspect.isclass(kind) and not issubclass(kind, Exception) and not hasattr(kind, "model_fields")
            if made and kind.__module__.startswith(package):
                missing[f"{package}.{name}"] = kind not in called
    wrong = [name for name, lacks in missing.items() if lacks != (name in exempt)]
    return wrong + [name for name in exempt if name not in missing]


def _parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters) if inspect.isfunction(function) else []
