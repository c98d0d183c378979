"""Which upstream place each hook point equals, and how to read those places.

A table has one row a line::

    blocks.{l}               ->  blocks.{l}.hook_resid_post
    blocks.{l}.norm1 : in    ->  blocks.{l}.hook_resid_pre
    blocks.{l}.attn.q_norm   ->  blocks.{l}.attn.hook_q         : b h p d -> b p h d
    blocks.{l}.attn @ softmax : in  ->  blocks.{l}.attn.hook_attn_scores

A place is a module's output, its first input (``: in``, or ``: in1`` for the second), or an argument or the result of a
torch function called directly in that module's forward (``MODULE @ FUNCTION``; ``#1`` behind the name for its second
call). Where several tensors come out, ``: out`` is the first and ``: out1`` the second.

For a model without a canonical form (``prisma_core.upstream``) the table is all there is, so each row names the axes as
well, alone or as the right side of its einops, and may end in an equation. The fused kernel can be opened there::

    blocks.{l}                    ->  blocks.{l}.hook_resid_post     : batch pos d_model  = resid_mid + mlp_out
    blocks.{l}.attn @ softmax     ->  blocks.{l}.attn.hook_pattern   : (batch window) head q k -> batch window head q k
    blocks.{l}.attn @ scaled_dot_product_attention : scores  ->  blocks.{l}.attn.hook_attn_scores  : batch head q k
    blocks.{l}.attn @ scaled_dot_product_attention : pattern ->  blocks.{l}.attn.hook_pattern      : batch head q k
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from prisma_core.errors import PrismaError, UnknownName, suggest
from prisma_core.hooks.query import tagged
from prisma_core.maps.rule import checked_sizes, rearranged

_MARK = re.compile(r"\{\w+\}")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_HOOK = re.compile(r"(\w|\.|\{\w+\})+")
_PLACE = re.compile(
    r"(?P<module>[\w.{}]*)(\s*@\s*(?P<function>\w+)(#(?P<call>\d+))?)?(\s*:\s*(?P<side>out\d*|in\d*|scores|pattern))?"
)
FUSED = "scaled_dot_product_attention"
INSIDE = ("scores", "pattern")  # of fused attention: no argument and no result, and seen only where they are made


@dataclass(frozen=True)
class Place:
    """Where in an upstream model a tensor passes by."""

    module: str
    function: str | None = None
    call: int = 0
    side: str = "out"

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read a place (see the module's docstring).

        Raises:
            PrismaError: it is none.
        """
        match = _PLACE.fullmatch(text.strip())
        if match is None:
            raise PrismaError(f"{text!r} is not a place: expected 'MODULE', 'MODULE : in' or 'MODULE @ FUNCTION : in'.")
        if match["side"] in INSIDE and match["function"] != FUSED:
            raise PrismaError(f"{text!r} is not a place: scores and pattern are parts of 'MODULE @ {FUSED}'.")
        return cls(match["module"], match["function"], int(match["call"] or 0), match["side"] or "out")

    def pick(self, args: tuple[Any, ...], result: Any) -> Tensor | None:
        """Return the tensor that passes here, given a call's arguments and result."""
        if self.side in INSIDE:
            return None
        several = args if self.side.startswith("in") else result
        value: Any = several
        if isinstance(several, tuple):
            given = cast("tuple[Any, ...]", several)
            value = given[self.index] if self.index < len(given) else None
        elif self.index:
            value = None
        return value if isinstance(value, Tensor) else None

    @property
    def index(self) -> int:
        """Which of several tensors it is."""
        return int(self.side.lstrip("inout") or 0)

    def __str__(self) -> str:
        call = f"#{self.call}" if self.call else ""
        function = f" @ {self.function}{call}" if self.function else ""
        side = "" if self.side == "out" else f" : {self.side}"
        return f"{self.module}{function}{side}".strip()


@dataclass(frozen=True)
class Row:
    """One line of a table, its numbers bound."""

    place: Place
    hook: str
    how: str = ""
    equation: str = ""

    @property
    def axes(self) -> str:
        """The names of the activation's axes; empty where the row does not say."""
        return self.how.partition("->")[2].strip() or self.how

    def read(self, tensor: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """Return upstream's tensor as the hook point shows it."""
        return rearranged(tensor, self.how, sizes, row=self)

    def write(self, activation: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """Return an activation as upstream holds it: ``read`` the other way round."""
        return rearranged(activation, self.how, sizes, row=self, back=True)

    def __str__(self) -> str:
        return f"{self.place} -> {self.hook}" + (f" : {self.how}" if self.how else "")


@dataclass(frozen=True)
class HookMap:
    """A table from upstream places to hook points (see the module's docstring)."""

    rows: tuple[tuple[str, str, str], ...]
    sizes: Mapping[str, int]

    @classmethod
    def parse(cls, table: str, **sizes: int) -> HookMap:
        """Read a table.

        Raises:
            PrismaError: a line is not a row.
        """
        sizes = checked_sizes(sizes, "HookMap.parse takes the table", PrismaError)
        rows: list[tuple[str, str, str]] = []
        for line in filter(None, (line.strip() for line in table.splitlines())):
            place, arrow, rest = (part.strip() for part in line.partition("->"))
            hook, _, how = (part.strip() for part in rest.partition(" : "))
            if not arrow or not hook:
                raise PrismaError(f"{line!r} is not a row: expected 'PLACE -> HOOK POINT : EINOPS = EQUATION'.")
            if "->" in hook:
                told = "a second arrow stands before ' : ', where the einops pattern begins. A row has one hook point"
                raise PrismaError(f"{line!r} is not a row: {told}.")
            if not _HOOK.fullmatch(hook):
                raise PrismaError(f"{line!r} is not a row: {hook!r} is no name of a hook point.")
            einops = _parted(how)[0]
            if "{" in einops:
                told = "functions are for weight maps; what a hook point shows is rearranged by an einops pattern alone"
                raise PrismaError(f"{line!r} is not a row: {told}.")
            if any(mark in einops for mark in ":|[") or einops.count("->") > 1:
                raise PrismaError(f"{line!r} is not a row: {einops!r} is no einops pattern.")
            if unbound := set(_MARK.findall(place)) - set(_MARK.findall(hook)):
                marks = ", ".join(sorted(unbound))
                raise PrismaError(f"{line!r}: {marks} stands in the place but not in the hook point.")
            Place.parse(_MARK.sub("0", place))
            rows.append((place, hook, how))
        _once(hook for _, hook, _ in rows)
        return cls(tuple(rows), sizes)

    def prefixed(self, upstream: str, canonical: str) -> HookMap:
        """Return this table for models that hold upstream's and ours as parts: ``prefixed("trunk.", "vision.")``.

        Args:
            upstream: what upstream's modules begin with in the larger model.
            canonical: what our hook points begin with there.
        """
        tag = re.sub(r"\W", "_", canonical).strip("_")

        def inside(place: str) -> str:
            at_root = not place or place[0] in "@:"  # the part itself
            return f"{upstream.rstrip('.')} {place}".strip() if at_root else upstream + place

        rows = ((inside(place), canonical + hook, tagged(how, self.sizes, tag)) for place, hook, how in self.rows)
        return HookMap(tuple(rows), {tagged(name, [name], tag): size for name, size in self.sizes.items()})

    def without(self, *hooks: str) -> HookMap:
        """Return this table without the rows of these hook points."""
        return HookMap(tuple(row for row in self.rows if row[1] not in hooks), self.sizes)

    def __or__(self, other: HookMap) -> HookMap:
        """Return the table with the rows of both."""
        return HookMap(self.rows + other.rows, {**self.sizes, **other.sizes})

    def bound(self, hooks: Iterable[str]) -> list[Row]:
        """Return the rows for the given hook points, ``{l}`` and the like filled in.

        Rows for hook points that are not given are left out: a table may speak of parts a model lacks.

        Raises:
            PrismaError: several rows speak of one hook point.
        """
        bound: list[Row] = []
        patterns = [_pattern_of(hook) for _, hook, _ in self.rows]
        for name in hooks:
            for (place, _, how), pattern in zip(self.rows, patterns, strict=True):
                if match := pattern.fullmatch(name):
                    bound.append(Row(Place.parse(place.format(**match.groupdict())), name, *_parted(how)))
        _once(row.hook for row in bound)
        return bound

    def check(self, points: Collection[str], lacking: Collection[str]) -> None:
        """Refuse rows whose right side is a name that no model has: nothing would ever look at them.

        Args:
            points: the model's hook points.
            lacking: those of parts that it might have, ``{l}`` and the like in the place of numbers.

        Raises:
            UnknownName: a row is for no hook point; the nearest are suggested.
        """
        families = set(map(_family, lacking))
        for place, hook, _ in self.rows:
            pattern = _pattern_of(hook)
            if _family(hook) in families or any(map(pattern.fullmatch, points)):
                continue
            known = {_NUMBER.sub("{l}", name) if "{" in hook else name for name in points}
            raise UnknownName(f"'{place} -> {hook}': {hook} is no hook point of this model.{suggest(hook, known)}")

    def plain(self) -> list[Row]:
        """Return every row of a table without marks, in order.

        Raises:
            PrismaError: a row has a mark: nothing says which numbers it stands for.
        """
        for place, hook, _ in self.rows:
            if _MARK.search(place + hook):
                raise PrismaError(f"'{place} -> {hook}' leaves numbers open; write a row for each layer.")
        _once(hook for _, hook, _ in self.rows)
        return [Row(Place.parse(place), hook, *_parted(how)) for place, hook, how in self.rows]


def _family(hook: str) -> str:
    """Return a name without its numbers, marks or not."""
    return _MARK.sub("{}", _NUMBER.sub("{}", hook))


def _pattern_of(hook: str) -> re.Pattern[str]:
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        again = match[1] in seen
        seen.add(match[1])
        return f"(?P={match[1]})" if again else rf"(?P<{match[1]}>\d+)"

    return re.compile(re.sub(r"\\\{(\w+)\\\}", group, re.escape(hook)))


def _once(hooks: Iterable[str]) -> None:
    twice = [name for name, n in Counter(hooks).items() if n > 1]
    if twice:
        raise PrismaError(f"The hook map has several rows for {twice[0]}: a hook point equals one place. Keep one row.")


def _parted(how: str) -> tuple[str, str]:
    """Return a row's einops or axes, and its equation."""
    einops, _, equation = how.partition(" = ")
    return einops.strip(), equation.strip()
