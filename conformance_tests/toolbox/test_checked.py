"""Arguments are read by their annotations: numbers of other libraries, refusals in words, nothing changed beside."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from models import build
from torch import Tensor

from prisma_core import HookedText, HookedViT, InputError
from prisma_core.plugin import Count, Indices, Part, Share, checked
from prisma_core.toolbox.arguments import _of_parameter  # pyright: ignore[reportPrivateUsage]


@checked
def everything(
    count: Count = 1,
    share: Share = 0.5,
    part: Part = 0.5,
    several: Indices | int | None = None,
    flag: bool = False,
    word: Literal["a", "b"] = "a",
    place: str | Path | None = None,
    x: Tensor | None = None,
    pair: tuple[int, str] = (0, ""),
    table: Mapping[str, int] | None = None,
    loader: Iterable[Tensor] = (),
    call: Callable[[int], int] | None = None,
    names: Sequence[str] = (),
    anything: Any = None,
    unknown: NoSuchType = None,  # type: ignore[name-defined]  # noqa: F821
) -> dict[str, Any]:
    return dict(locals())


TAKEN = {
    "numpy's whole numbers": ({"count": np.int64(3)}, 3),
    "torch's whole numbers": ({"count": torch.tensor(3)}, 3),
    "a whole number for a share": ({"share": 1}, 1.0),
    "numpy's numbers": ({"share": np.float32(0.5)}, 0.5),
    "an array of positions": ({"several": np.array([1, 2])}, [1, 2]),
    "a tensor of positions": ({"several": torch.tensor([1, 2])}, [1, 2]),
    "a range": ({"several": range(2)}, (0, 1)),
    "numpy's truth": ({"flag": np.True_}, True),
    "a path as text": ({"place": "here"}, Path("here")),
    "a path": ({"place": Path("here")}, Path("here")),
    "a generator": ({"loader": (generator := iter(()))}, generator),
    "what is not annotated": ({"anything": {1}}, {1}),
    "what is annotated by an unknown name": ({"unknown": 7}, 7),
}
REFUSED = {
    "a truth as a number": ({"count": True}, "count= to be a whole number; got True"),
    "zero": ({"count": 0}, "at least 1"),
    "more than any memory holds": ({"count": 10**18}, "count= to be at most 16777216"),
    "half a number": ({"count": 1.5}, "got 1.5"),
    "a share above 1": ({"share": 1.1}, "share= to be at most 1; got 1.1"),
    "no number": ({"share": float("nan")}, "got nan"),
    "all of the data": ({"part": 1}, "part= to be below 1; got 1"),
    "an empty list": ({"several": []}, r"a list \(at least 1\) or a whole number or None; got \[\]"),
    "a number in a list of positions": ({"several": [1, 2.5]}, r"several\[1\]= to be a whole number; got 2.5"),
    "a truth as text": ({"flag": "no"}, "True or False; got 'no'"),
    "another word": ({"word": "c"}, "'a' or 'b'; got 'c'"),
    "no path": ({"place": ""}, "a path that the disk takes or None; got ''"),
    "a list for a tensor": ({"x": [1.0]}, r"a tensor or None; got \[1.0\]"),
    "one of two": ({"pair": (1,)}, r"pair\[1\]= to be given; got \(1,\)"),
    "a table of texts": ({"table": {"a": "b"}}, r"table\['a'\]= to be a whole number; got 'b'"),
    "a tensor for batches": ({"loader": torch.zeros(2)}, "several"),
    "no function": ({"call": 3}, "a function or None; got 3"),
    "a text for texts": ({"names": "cat"}, "a list; got 'cat'"),
}


@pytest.mark.parametrize(("given", "value"), TAKEN.values(), ids=TAKEN)
def test_what_makes_sense_is_taken(given: dict[str, Any], value: object) -> None:
    result = everything(**given)[next(iter(given))]
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(("given", "words"), REFUSED.values(), ids=REFUSED)
def test_what_makes_none_is_refused_in_words(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=f"everything expected .*{words}"):
        everything(**given)


def test_objects_are_passed_on_as_they_are() -> None:
    x, anything, loader, call = torch.zeros(2), {"a": [1]}, iter([torch.zeros(1)]), len
    given = {"x": x, "anything": anything, "loader": loader, "call": call}
    result = everything(**given)  # type: ignore[arg-type]
    assert all(result[name] is value for name, value in given.items())
    assert len(list(loader)) == 1  # nothing was taken from it
    assert everything(names=(pair := namedtuple("pair", "a b")("a", "b")))["names"] == tuple(pair)


def test_models_of_two_kinds_and_a_class_loaded_again() -> None:
    @dataclass
    class Facts:
        size: int

    def width(model: HookedViT | HookedText, facts: Facts | None = None) -> object:
        return facts

    width.__annotations__ = {"model": HookedViT | HookedText, "facts": Facts | None}
    again = type(Facts.__name__, (), {"__module__": Facts.__module__, "__qualname__": Facts.__qualname__})()
    model = build().float()
    assert checked(width)(model, again) is again  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"model= to be a model, as prisma.load and prisma.adapt return; got 3"):
        checked(width)(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"facts= to be a Facts or None; got \{'size': 3\}"):
        checked(width)(model, {"size": 3})  # type: ignore[arg-type]


def test_methods_classes_and_further_arguments() -> None:
    @checked
    @dataclass
    class Box:
        size: Count = 1

        @classmethod
        @checked
        def of(cls, *names: str, **sizes: int) -> Box:
            return cls(sum(sizes.values()) + len(names))

    assert Box(np.int64(2)).size == 2  # type: ignore[arg-type]
    assert isinstance(Box(), Box)
    assert Box.of("a", "b", width=np.int64(3)) == Box(5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Box expected size= .* got 0"):
        Box(0)
    with pytest.raises(InputError, match=r"of expected names\[0\]= to be a text; got 1"):
        Box.of(1)  # type: ignore[arg-type]


def test_the_function_shows_through() -> None:
    assert inspect.signature(everything).parameters["count"].default == 1
    assert everything.__name__ == "everything"
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        everything(size=1)  # type: ignore[call-arg]


def test_every_argument_is_read_but_those_that_may_be_anything() -> None:
    """An alias that is a text, or a name that only type checkers import, would pass anything on in silence."""
    functions: set[Callable[..., Any]] = set()
    for plugin in ("dino", "harvest", "lens", "patch", "registers", "sae", "toy", "view"):
        package = importlib.import_module(f"prisma_{plugin}")
        for each in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            values = [*vars(importlib.import_module(each.name)).values()]
            values += [
                getattr(part, "__func__", part)
                for kind in values
                if isinstance(kind, type)
                for part in vars(kind).values()
            ]
            functions |= {
                value for value in values if inspect.isfunction(value) and "readers" in value.__code__.co_freevars
            }
    assert len(functions) > 100
    unread: set[str] = set()
    for function in functions:
        scope = inspect.unwrap(function).__globals__
        for parameter in inspect.signature(function).parameters.values():
            hint = str(parameter.annotation)
            if _of_parameter(parameter, scope) is Any and parameter.name not in ("self", "cls"):
                unread.add(hint)
    assert {hint for hint in unread if not re.search(r"\bAny\b|\bTarget\b|\bFloat\[", hint)} == set()
