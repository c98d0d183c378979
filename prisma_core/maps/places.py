"""Hook maps: which upstream place each hook point equals.

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

    blocks.{l}            ->  blocks.{l}.hook_resid_post    : batch pos d_model  = resid_mid + mlp_out
    attn.{l} @ softmax -> blocks.{l}.attn.hook_pattern : (batch head) query_pos key_pos -> batch head query_pos key_pos
    attn.{l} @ scaled_dot_product_attention : scores  -> blocks.{l}.attn.hook_attn_scores : batch head query_pos key_pos
    attn.{l} @ scaled_dot_product_attention : pattern -> blocks.{l}.attn.hook_pattern     : batch head query_pos key_pos
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor

from prisma_core.errors import PrismaError
from prisma_core.maps.table import FUNCTION, MARK, Function, Line, Table, bind, pattern_of

_HOOK = re.compile(r"(\w|\.|\{\w+\})+")
_PLACE = re.compile(
    r"(?P<module>[\w.{}]*)(\s*@\s*(?P<function>\w+)(#(?P<call>\d+))?)?(\s*:\s*(?P<side>out\d*|in\d*|scores|pattern))?"
)
FUSED = "scaled_dot_product_attention"
INSIDE = ("scores", "pattern")  # of fused attention: no argument and no result, and seen only where they are made


@dataclass(frozen=True)
class Place:
    """A point in an upstream model that a tensor passes.

    Attributes:
        module: the module's name, with marks in an unbound row; empty for the model itself.
        function: a torch function that its forward calls, or None for the module's own call.
        call: which of its calls, from 0.
        side: ``in``, ``out``, with a number for other than the first tensor; ``scores`` or ``pattern``.
    """

    module: str
    function: str | None = None
    call: int = 0
    side: str = "out"

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read a place (see the module's docstring).

        >>> Place.parse("blocks.0.attn @ softmax#1 : in")
        Place(module='blocks.0.attn', function='softmax', call=1, side='in')

        Raises:
            PrismaError: the text is no place.
        """
        match = _PLACE.fullmatch(text.strip())
        if match is None:
            raise PrismaError(f"{text!r} is not a place: expected 'MODULE', 'MODULE : in' or 'MODULE @ FUNCTION : in'.")
        if match["side"] in INSIDE and match["function"] != FUSED:
            raise PrismaError(f"{text!r} is not a place: scores and pattern are parts of 'MODULE @ {FUSED}'.")
        return cls(match["module"], match["function"], int(match["call"] or 0), match["side"] or "out")

    def pick(self, args: tuple[Any, ...], result: Any) -> Tensor | None:
        """Pick the tensor that passes here from a call's arguments and result; None if there is none."""
        if self.side in INSIDE:
            return None
        value: Any = args if self.side.startswith("in") else result
        values = cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)
        value = values[self.index] if self.index < len(values) else None
        return value if isinstance(value, Tensor) else None

    @property
    def index(self) -> int:
        """The tensor's number among several arguments or results."""
        return int(self.side.lstrip("inout") or 0)

    def __str__(self) -> str:
        call = f"#{self.call}" if self.call else ""
        function = f" @ {self.function}{call}" if self.function else ""
        side = "" if self.side == "out" else f" : {self.side}"
        return f"{self.module}{function}{side}".strip()


@dataclass(frozen=True)
class Row(Line):
    """One line of a hook map.

    Attributes:
        place: of upstream's tensor.
        hook: the hook point's name, with marks until the row is bound.
        how: an einops pattern from upstream's tensor to the activation, the activation's axes, or a ``{function}``.
        equation: of the activation, for people.
        call: the function.
    """

    place: Place
    hook: str
    how: str = ""
    equation: str = ""
    call: Function | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, line: str) -> Row:
        """Read ``PLACE -> HOOK POINT : EINOPS = EQUATION``.

        Raises:
            PrismaError: the line is not a row.
        """
        place, arrow, rest = (part.strip() for part in line.partition("->"))
        hook, _, after = (part.strip() for part in rest.partition(" : "))
        how, _, equation = (part.strip() for part in after.partition(" = "))
        unbound = ", ".join(f"{{{mark}}}" for mark in sorted(set(MARK.findall(place)) - set(MARK.findall(hook))))
        second = "a second arrow stands before ' : ', where the einops pattern begins. A row has one hook point"
        pattern = FUNCTION.fullmatch(how) or (how.count("->") <= 1 and not any(mark in how for mark in ":|[{"))
        cls.check(
            line,
            {
                "expected 'PLACE -> HOOK POINT : EINOPS = EQUATION'": not arrow or not hook,
                second: "->" in hook,
                f"{hook!r} is no name of a hook point": not _HOOK.fullmatch(hook),
                f"{how!r} is neither an einops pattern nor a {{function}}": not pattern,
                f"{unbound} stands in the place but not in the hook point": unbound,
            },
        )
        return cls(Place.parse(place), hook, how, equation)

    def target_names(self) -> tuple[str, ...]:
        return (self.hook,)

    @property
    def axes(self) -> str:
        """The names of the activation's axes, ``head`` for ``head2``; empty where the row does not say."""
        return "" if self.function else re.sub(r"(?<=[a-z])\d+", "", self.how.partition("->")[2].strip() or self.how)

    def bind(self, values: Mapping[str, str]) -> Row:
        """Fill in the marks."""
        place = replace(self.place, module=bind(self.place.module, values))
        return replace(self, place=place, hook=bind(self.hook, values), equation=bind(self.equation, values))

    def prefixed(self, upstream: str, canonical: str, retag: Callable[[str], str]) -> Row:
        place = replace(self.place, module=(upstream + self.place.module).rstrip("."))
        return replace(self, place=place, hook=canonical + self.hook, how=retag(self.how))

    def __str__(self) -> str:
        return f"{self.place} -> {self.hook}" + (f" : {self.how}" if self.how else "")


@dataclass(frozen=True)
class HookMap(Table[Row]):
    """A table from upstream places to hook points (see the module's docstring)."""

    @classmethod
    def parse(cls, table: str, functions: Mapping[str, Function] | None = None, **sizes: int) -> HookMap:
        """Read a table.

        >>> print(HookMap.parse("layers.{l} : in -> blocks.{l}.hook_resid_pre").bound(["blocks.3.hook_resid_pre"])[0])
        layers.3 : in -> blocks.3.hook_resid_pre

        Args:
            functions: what ``{name}`` in a row stands for: a function of upstream's tensor.
            sizes: lengths of axes that einops patterns name.

        Raises:
            PrismaError: a line is not a row, or names a function that is not given.
        """
        lines, sizes = Row.lines(table, sizes, "HookMap.parse takes the table, functions={...}")
        rows = tuple(Row.parse(line).resolved(functions, "HookMap") for line in lines)
        _once(rows)
        return cls(rows, sizes)

    def bound(self, hooks: Iterable[str]) -> list[Row]:
        """The rows of the given hook points, ``{l}`` and the like filled in.

        Rows of other hook points are left out: a table may speak of parts a model lacks.

        Raises:
            PrismaError: several rows speak of one hook point.
        """
        patterns = [(row, pattern_of(row.hook)) for row in self.rows]
        rows = [
            row.bind(match.groupdict()) for hook in hooks for row, one in patterns if (match := one.fullmatch(hook))
        ]
        _once(rows)
        return rows


def _once(rows: Iterable[Row]) -> None:
    twice = [name for name, n in Counter(row.hook for row in rows).items() if n > 1]
    if twice:
        raise PrismaError(f"The hook map has several rows for {twice[0]}: a hook point equals one place. Keep one row.")
