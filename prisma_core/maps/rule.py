"""One line of a weight map."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prisma_core.errors import WeightMapError
from prisma_core.maps.table import FUNCTION, MARK, Function, Line, bind

CONSTANTS: dict[str, Callable[..., Tensor]] = {"zeros": torch.zeros, "ones": torch.ones}
_NAME = re.compile(rf"(\w|[.-]|{MARK.pattern})+")


@dataclass(frozen=True)
class Rule(Line):
    """Upstream's tensors, each with its alternatives in order, that make canonical ones.

    Attributes:
        how: an einops pattern for each source, or ``{function}`` of all of them, or of none.
        patterns: of each source that has one of its own, empty for others; none if no source has.
    """

    kind, error = "rule", WeightMapError
    sources: tuple[tuple[str, ...], ...]
    targets: tuple[str, ...]
    how: str = ""
    patterns: tuple[str, ...] = ()
    call: Function | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, line: str) -> Rule:
        """Read ``SOURCE -> TARGET : HOW``.

        Raises:
            WeightMapError: the line is not a rule.
        """
        bare, patterns = _own_patterns(line)
        body, _, how = (part.strip() for part in bare.partition(" : "))
        left, arrow, right = (part.strip() for part in body.partition("->"))
        alone = FUNCTION.fullmatch(left)  # it makes what upstream keeps in no tensor
        cls.check(
            line,
            {
                "expected 'SOURCE -> TARGET : HOW'": not arrow or not left or not right,
                "a second arrow stands before ' : ', where the einops pattern begins": "->" in right,
                "what may be missing stands on the left: 'SOURCE | zeros -> TARGET : HOW'": "|" in right + how,
                f"{how!r} is neither an einops pattern, 'LEFT -> RIGHT', nor a {{function}}": how
                and not FUNCTION.fullmatch(how)
                and how.count("->") != 1,
                "patterns stand behind single sources or behind all of them": how and patterns,
                "a pattern of a source is 'LEFT -> RIGHT'": any(each and each.count("->") != 1 for each in patterns),
                "a function without sources makes the target as it is: '{function} -> TARGET'": alone and how,
            },
        )
        sources = () if alone else tuple(tuple(map(str.strip, name.split("|"))) for name in _listed(left))
        rule = cls(sources, tuple(_listed(right)), left if alone else how, patterns)
        names = [*rule.names, *rule.targets]
        cls.check(line, {"a name is missing": not rule.targets or not all(names)})
        cls.check(line, {f"{name!r} is no name of a tensor": not _NAME.fullmatch(name) for name in names})
        marks = {mark for name in rule.names for mark in MARK.findall(name)}
        unbound = {
            f"{{{mark}}} stands in a source but not in {target}": f"{{{mark}}}" not in target
            for target in rule.targets
            for mark in sorted(marks)
        }
        cls.check(line, unbound)
        return rule

    def target_names(self) -> tuple[str, ...]:
        return self.targets

    @property
    def names(self) -> tuple[str, ...]:
        """Every source, alternatives too."""
        return tuple(name for options in self.sources for name in options)

    def bind(self, values: Mapping[str, str]) -> Rule:
        """Fill in the marks."""
        sources = tuple(tuple(bind(name, values) for name in options) for options in self.sources)
        return replace(self, sources=sources, targets=tuple(bind(name, values) for name in self.targets))

    def part(self, index: int) -> Rule:
        """The rule with the pattern of one of its sources."""
        return replace(self, how=self.patterns[index]) if self.patterns else self

    def prefixed(self, upstream: str, canonical: str, retag: Callable[[str], str]) -> Rule:
        sources = tuple(tuple(name if name in CONSTANTS else upstream + name for name in each) for each in self.sources)
        patterns = tuple(map(retag, self.patterns))
        targets = tuple(canonical + target for target in self.targets)
        return replace(self, sources=sources, targets=targets, how=retag(self.how), patterns=patterns)

    def __str__(self) -> str:
        sources, right = [" | ".join(options) for options in self.sources], _joined(self.targets)
        hows = self.patterns or ("",) * len(sources)
        left = _joined([f"{one} : {how}" if how else one for one, how in zip(sources, hows, strict=True)])
        if not left and self.function is not None:
            return f"{self.how} -> {right}"
        return f"{left or '[]'} -> {right}" + (f" : {self.how}" if self.how else "")


def _own_patterns(line: str) -> tuple[str, tuple[str, ...]]:
    """Take the patterns out of a list of sources: the line without them, and one for each source; none if none has."""
    listed, bracket, rest = line.partition("]")
    if not bracket or not listed.startswith("[") or " : " not in listed:
        return line, ()
    items = [[part.strip() for part in item.partition(" : ")] for item in listed[1:].split(",")]
    return f"[{', '.join(item[0] for item in items)}]{rest}", tuple(item[2] for item in items)


def _joined(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]" if len(names) > 1 else "".join(names)


def _listed(text: str) -> list[str]:
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else None
    if inside is not None and not inside.strip():
        return []
    return [text] if inside is None else [part.strip() for part in inside.split(",")]
