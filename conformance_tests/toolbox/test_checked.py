"""Arguments are read by their annotations: numbers of other libraries, refusals in words, nothing changed beside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from prisma_core import InputError
from prisma_core.plugin import Count, Indices, Part, Share, checked


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
    "a truth as a number": ({"count": True}, "count= to be a whole number of at least 1 and of at most .*; got True"),
    "zero": ({"count": 0}, "at least 1"),
    "more than any memory holds": ({"count": 10**18}, "at most 16777216"),
    "half a number": ({"count": 1.5}, "got 1.5"),
    "a share above 1": ({"share": 1.1}, "a number of at least 0 and of at most 1; got 1.1"),
    "no number": ({"share": float("nan")}, "got nan"),
    "all of the data": ({"part": 1}, "above 0 and below 1"),
    "an empty list": ({"several": []}, r"a list, each a whole number \(at least 1\).* None; got \[\]"),
    "a number in a list of positions": ({"several": [1, 2.5]}, r"\[1, 2.5\]"),
    "a truth as text": ({"flag": "no"}, "True or False; got 'no'"),
    "another word": ({"word": "c"}, "'a' or 'b'; got 'c'"),
    "no path": ({"place": ""}, "a path or None; got ''"),
    "a list for a tensor": ({"x": [1.0]}, r"a tensor or None; got \[1.0\]"),
    "one of two": ({"pair": (1,)}, r"\(a whole number, a text\); got \(1,\)"),
    "a table of texts": ({"table": {"a": "b"}}, "a dictionary of a text to a whole number"),
    "a tensor for batches": ({"loader": torch.zeros(2)}, "several"),
    "no function": ({"call": 3}, "a function or None; got 3"),
    "a text for texts": ({"names": "cat"}, "a list, each a text; got 'cat'"),
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
    with pytest.raises(InputError, match="of expected names= to be a text"):
        Box.of(1)  # type: ignore[arg-type]


def test_the_function_shows_through() -> None:
    assert inspect.signature(everything).parameters["count"].default == 1
    assert everything.__name__ == "everything"
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        everything(size=1)  # type: ignore[call-arg]
