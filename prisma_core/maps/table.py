"""The grammar and the algebra that weight maps and hook maps share."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from operator import index
from typing import Any, ClassVar, Generic, Self, SupportsIndex, TypeAlias, TypeVar, cast

from einops import EinopsError, rearrange
from torch import Tensor

from prisma_core.errors import PrismaError, blaming, describe, returned

MARK = re.compile(r"\{([^\W\d]\w*|\*)\}")  # {l} and the like for a number, {*} for any rest
FUNCTION = re.compile(r"\{\w+\}")  # in the place of an einops pattern
Function: TypeAlias = Callable[..., Tensor]


@lru_cache(maxsize=4096)
def pattern_of(name: str) -> re.Pattern[str]:
    """Compile a name with marks.

    >>> pattern_of("layers.{l}.{*}").fullmatch("layers.3.norm.weight").groupdict()
    {'l': '3', 'rest': 'norm.weight'}
    """
    pattern, seen = "", set[str]()
    for place, part in enumerate(MARK.split(name)):
        group, value = ("rest", ".+") if part == "*" else (part, r"\d+")
        if place % 2 == 0:
            pattern += re.escape(part)
        else:
            pattern += f"(?P={group})" if part in seen else f"(?P<{group}>{value})"
            seen.add(part)
    return re.compile(pattern)


def bind(name: str, values: Mapping[str, str]) -> str:
    """Fill in the marks of a name with the groups of a match of ``pattern_of``."""
    return MARK.sub(lambda mark: values["rest" if mark[1] == "*" else mark[1]], name)


class Line(ABC):
    """One line of a table.

    Attributes:
        how: an einops pattern from upstream's tensor to Prisma's, or a ``{function}``; else it stays as it is.
        call: the function.
        kind, error: the word for a line in errors, and their class.
    """

    how: str
    call: Function | None
    kind: ClassVar[str] = "row"
    error: ClassVar[type[PrismaError]] = PrismaError

    @classmethod
    def check(cls, line: str, problems: Mapping[str, object]) -> None:
        """Refuse a line with a problem: ``{description: whether it is there}``.

        Raises:
            PrismaError: the first problem; of the line's kind.
        """
        for problem, there in problems.items():
            if there:
                raise cls.error(f"{line!r} is not a {cls.kind}: {problem}.")

    @classmethod
    def lines(cls, table: str, sizes: Mapping[str, Any], takes: str) -> tuple[list[str], dict[str, int]]:
        """Split a table into its lines, and check the lengths of axes that came with it.

        Args:
            takes: the other arguments of ``parse``, for errors.

        Raises:
            PrismaError: the table is no text, or a size is no length; of the line's kind.
        """
        text = cast("object", table)
        if not isinstance(text, str):
            raise cls.error(f"{takes}: expected a text with a {cls.kind} a line, got {type(text).__name__}.")
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, SupportsIndex) or index(size) < 1:
                raise cls.error(
                    f"{name}={size!r} is no length of an axis: {takes}, and keywords that give axes of einops patterns "
                    "their length, such as h=12."
                )
        lengths = {name: index(size) for name, size in sizes.items()}
        return [line.strip() for line in text.splitlines() if line.strip()], lengths

    @property
    def function(self) -> str | None:
        """The name of the function in the place of a pattern, or None."""
        return self.how.strip("{}") if self.how.startswith("{") else None

    def resolved(self, functions: Mapping[str, Function] | None, table: str) -> Self:
        """The line with the function that it names; a ``PrismaError`` says how to give it to a ``table``."""
        if (name := self.function) is None:
            return self
        given = functions.items() if isinstance(functions, Mapping) else ()
        known = {key: call for key, call in given if callable(call)}
        if name not in known:
            there = f"there are {', '.join(known)}" if known else "none were given"
            raise self.error(
                f"{self}: no function {self.how} was given; {there}. "
                f"Pass it: {table}.parse(table, functions={{{name!r}: {name}}})."
            )
        return replace(cast("Any", self), call=known[name])

    def compute(self, *tensors: Tensor) -> Tensor:
        """Call the line's function with upstream's tensors; a ``PrismaError`` says where it fails."""
        assert self.call is not None
        with blaming(self.call, name := f"{self}: {self.how}", self.error):
            return returned(name, self.call(*tensors), Tensor)

    @abstractmethod
    def target_names(self) -> tuple[str, ...]:
        """The names on Prisma's side, with marks."""

    @abstractmethod
    def prefixed(self, upstream: str, canonical: str, retag: Callable[[str], str]) -> Self:
        """The line in a larger model; ``retag`` renames the axes of an einops pattern that have a size."""

    def read(self, tensor: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """Turn upstream's tensor into Prisma's; a view where a pattern can make one.

        Args:
            sizes: lengths of axes, of more than the pattern names too.

        Raises:
            PrismaError: the pattern does not fit, or the function fails.
        """
        if self.call is not None:
            return self.compute(tensor)
        return self._rearrange(tensor, sizes, *self.how.partition("->"))

    def write(self, tensor: Tensor, sizes: Mapping[str, int], shape: Sequence[int] = ()) -> Tensor:
        """Rearrange Prisma's tensor to upstream's: the inverse of ``read``.

        Args:
            shape: upstream's, which tells the lengths of the axes that stand alone on the left of the pattern.
        """
        left, arrow, right = self.how.partition("->")
        axes = re.findall(r"\([^)]*\)|\S+", left)
        alone = dict(zip(axes, shape, strict=True)) if len(axes) == len(shape) and "..." not in axes else {}
        lengths = {axis: length for axis, length in alone.items() if axis.isidentifier()}
        return self._rearrange(tensor, {**sizes, **lengths}, right, arrow, left)

    def _rearrange(self, tensor: Tensor, sizes: Mapping[str, int], left: str, arrow: str, right: str) -> Tensor:
        if not arrow:
            return tensor
        named = {name: size for name, size in sizes.items() if re.search(rf"\b{name}\b", self.how)}
        try:
            return rearrange(tensor, left + arrow + right, **named)
        except EinopsError as problem:
            raise self.error(f"{self}: {' '.join(str(problem).split())}") from problem


L = TypeVar("L", bound=Line)


@dataclass(frozen=True)
class Table(Generic[L]):
    """Lines from names of upstream's to names of Prisma's.

    Attributes:
        rows: the lines.
        sizes: lengths of axes that einops patterns name.
    """

    rows: tuple[L, ...]
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        if odd := [row for row in self.rows if not isinstance(cast("object", row), Line)]:
            raise PrismaError(f"Expected lines, as {type(self).__name__}.parse reads them; got {describe(odd[0])}.")

    def prefixed(self, upstream: str, canonical: str) -> Self:
        """The table for models that hold upstream's and Prisma's as parts: ``prefixed("trunk.", "vision.")``.

        Args:
            upstream: the prefix of upstream's names in the larger model.
            canonical: the prefix of Prisma's names there.
        """
        tag = re.sub(r"\W", "_", canonical).strip("_")

        def retag(how: str) -> str:  # two tables may give one axis different lengths
            return re.sub(r"\w+", lambda axis: f"{axis[0]}_{tag}" if tag and axis[0] in self.sizes else axis[0], how)

        rows = tuple(row.prefixed(upstream, canonical, retag) for row in self.rows)
        return replace(self, rows=rows, sizes={retag(name): size for name, size in self.sizes.items()})

    def without(self, *targets: str) -> Self:
        """The table without the lines for these names or patterns: ``without("head.{*}", "hook_logits")``."""

        def named(name: str) -> bool:
            return name in targets or any(pattern_of(target).fullmatch(name) for target in targets)

        return replace(self, rows=tuple(row for row in self.rows if not any(map(named, row.target_names()))))

    def __or__(self, other: Self) -> Self:
        """The table with the lines of both."""
        both = {one.name: (getattr(self, one.name), getattr(other, one.name)) for one in fields(self)}
        return replace(self, **{name: a + b if isinstance(a, tuple) else {**a, **b} for name, (a, b) in both.items()})
