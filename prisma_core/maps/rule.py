"""One line of a weight table: what it says, and which names it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from prisma_core.errors import PrismaError, WeightMapError

CONSTANTS: dict[str, Callable[..., Tensor]] = {"zeros": torch.zeros, "ones": torch.ones}
_MARK = re.compile(r"\\\{(\w+|\\\*)\\\}")
_FUNCTION = re.compile(r"\{\w+\}")
_NAME = re.compile(r"(\w|[.-]|\{\w+\}|\{\*\})+")


def pattern_of(name: str) -> re.Pattern[str]:
    """Return what matches the names that one with marks stands for: ``{l}`` a number, ``{*}`` any rest."""
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        mark = "rest" if match.group(1) == r"\*" else match.group(1)
        if mark in seen:
            return f"(?P={mark})"
        seen.add(mark)
        return r"(?P<rest>.+)" if mark == "rest" else rf"(?P<{mark}>\d+)"

    return re.compile(_MARK.sub(group, re.escape(name)))


def rearranged(
    tensor: Tensor,
    how: str,
    sizes: Mapping[str, int],
    *,
    row: object,
    back: bool = False,
    error: type[PrismaError] = PrismaError,
) -> Tensor:
    """Return a tensor by an einops pattern, given more ``sizes`` of axes than it may name; as it is without ``->``.

    Args:
        row: the line of a table that the pattern stands in, for the error.

    Raises:
        PrismaError: the pattern does not fit; of the kind given.
    """
    left, arrow, right = how.partition("->")
    if not arrow:
        return tensor
    named = {name: size for name, size in sizes.items() if re.search(rf"\b{name}\b", how)}
    try:
        return rearrange(tensor, f"{right} -> {left}" if back else how, **named)
    except EinopsError as problem:
        raise error(f"{row}: {' '.join(str(problem).split())}") from problem


def checked_sizes(sizes: Mapping[str, Any], takes: str, error: type[PrismaError]) -> dict[str, int]:
    """Return the lengths of axes that einops patterns name, as ``parse`` was given them.

    Args:
        takes: what else ``parse`` takes, for the error.

    Raises:
        PrismaError: one is no length; of the kind given.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, SupportsIndex) or index(size) < 1:
            raise error(
                f"{name}={size!r} is no length of an axis: {takes}, and keywords that give axes of einops patterns "
                f"their length, such as h=12."
            )
    return {name: index(size) for name, size in sizes.items()}


@dataclass(frozen=True)
class Rule:
    """One line of a table. ``sources`` holds for each place the alternatives, in order; a function may do without."""

    sources: tuple[tuple[str, ...], ...]
    targets: tuple[str, ...]
    how: str = ""

    @classmethod
    def parse(cls, line: str) -> Rule:
        """Read ``SOURCE -> TARGET : HOW``.

        Raises:
            WeightMapError: the line is not a rule.
        """
        body, _, how = (part.strip() for part in line.partition(" : "))
        left, arrow, right = (part.strip() for part in body.partition("->"))
        if not arrow or not left or not right:
            raise _no_rule(line, "expected 'SOURCE -> TARGET : HOW'")
        if "->" in right:
            raise _no_rule(line, "a second arrow stands before ' : ', where the einops pattern begins")
        if "|" in right + how:
            raise _no_rule(line, "what may be missing stands on the left: 'SOURCE | zeros -> TARGET : HOW'")
        if how and not _FUNCTION.fullmatch(how) and how.count("->") != 1:
            raise _no_rule(line, f"{how!r} is neither an einops pattern, 'LEFT -> RIGHT', nor a {{function}}")
        if _FUNCTION.fullmatch(left):  # what upstream keeps in no tensor
            if how:
                raise _no_rule(line, "a function without sources makes the target as it is: '{function} -> TARGET'")
            left, how = "", left
        sources = tuple(tuple(option.strip() for option in name.split("|")) for name in _listed(left)) if left else ()
        rule = cls(sources, tuple(_listed(right)), how)
        if not rule.targets:
            raise _no_rule(line, "a name is missing")
        for name in (*(name for options in sources for name in options), *rule.targets):
            if not _NAME.fullmatch(name):
                raise _no_rule(line, f"{name!r} is no name of a tensor" if name else "a name is missing")
        marks = {mark for options in sources for name in options for mark in re.findall(r"\{[\w*]+\}", name)}
        for target in rule.targets:
            if unbound := sorted(mark for mark in marks if mark not in target):
                raise _no_rule(line, f"{', '.join(unbound)} stands in a source but not in {target}")
        return rule

    @property
    def makes(self) -> bool:
        """Whether a function makes the targets."""
        return self.how.startswith("{")

    def bind(self, bound: Mapping[str, str]) -> Rule:
        """Return the rule with its marks filled in."""
        return Rule(
            tuple(tuple(_bind(name, bound) for name in options) for options in self.sources),
            tuple(_bind(name, bound) for name in self.targets),
            self.how,
        )

    def rearrange(self, tensor: Tensor, sizes: Mapping[str, int], *, back: bool = False) -> Tensor:
        """Return a source as the rule's einops pattern has it, or the other way round; a view where it can be.

        Raises:
            WeightMapError: the pattern does not fit.
        """
        return rearranged(tensor, self.how, sizes, row=self, back=back, error=WeightMapError)

    def __str__(self) -> str:
        left, right = _joined([" | ".join(options) for options in self.sources]), _joined(self.targets)
        if not left and self.makes:
            return f"{self.how} -> {right}"
        return f"{left or '[]'} -> {right}" + (f" : {self.how}" if self.how else "")


def _no_rule(line: str, why: str) -> WeightMapError:
    return WeightMapError(f"{line!r} is not a rule: {why}.")


def _joined(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]" if len(names) > 1 else "".join(names)


def _bind(name: str, bound: Mapping[str, str]) -> str:
    return name.replace("{*}", bound.get("rest", "")).format(**{k: v for k, v in bound.items() if k != "rest"})


def _listed(text: str) -> list[str]:
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else None
    if inside is not None and not inside.strip():
        return []
    return [text] if inside is None else [part.strip() for part in inside.split(",")]
