"""One line of a weight table: what it says, and which names it takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import EinopsError, rearrange
from torch import Tensor

from prisma_core.errors import WeightMapError

CONSTANTS: dict[str, Callable[..., Tensor]] = {"zeros": torch.zeros, "ones": torch.ones}
_MARK = re.compile(r"\\\{(\w+|\\\*)\\\}")


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


def rearranged(tensor: Tensor, how: str, sizes: Mapping[str, int], *, back: bool = False) -> Tensor:
    """Return a tensor by an einops pattern, given more ``sizes`` of axes than it may name; as it is without ``->``."""
    left, arrow, right = how.partition("->")
    if not arrow:
        return tensor
    named = {name: size for name, size in sizes.items() if re.search(rf"\b{name}\b", how)}
    return rearrange(tensor, f"{right} -> {left}" if back else how, **named)


@dataclass(frozen=True)
class Rule:
    """One line of a table. ``sources`` holds for each place the alternatives, in order."""

    sources: tuple[tuple[str, ...], ...]
    targets: tuple[str, ...]
    how: str = ""

    @classmethod
    def parse(cls, line: str) -> Rule:
        """Read ``SOURCE -> TARGET : HOW``.

        Raises:
            WeightMapError: the line is not a rule.
        """
        body, _, how = line.partition(" : ")
        left, arrow, right = body.partition("->")
        if not arrow or not left.strip() or not right.strip():
            raise WeightMapError(f"{line!r} is not a rule: expected 'SOURCE -> TARGET : HOW'.")
        sources = tuple(tuple(option.strip() for option in name.split("|")) for name in _listed(left))
        return cls(sources, tuple(_listed(right)), how.strip())

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
        try:
            return rearranged(tensor, self.how, sizes, back=back)
        except EinopsError as error:
            raise WeightMapError(f"{self}: {error}") from error

    def __str__(self) -> str:
        left = ", ".join(" | ".join(options) for options in self.sources)
        return f"{left} -> {', '.join(self.targets)}" + (f" : {self.how}" if self.how else "")


def _bind(name: str, bound: Mapping[str, str]) -> str:
    return name.replace("{*}", bound.get("rest", "")).format(**{k: v for k, v in bound.items() if k != "rest"})


def _listed(text: str) -> list[str]:
    text = text.strip()
    return [part.strip() for part in text[1:-1].split(",")] if text.startswith("[") else [text]
