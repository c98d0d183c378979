"""Hook tables beside a model: rows numbered by upstream's modules, and rows that no model has."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import groupby
from typing import cast

from torch import nn

from prisma_core.errors import PrismaError, UnknownName, suggest
from prisma_core.maps.places import HookMap, Row
from prisma_core.maps.table import MARK, bind, pattern_of

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def numbered(table: HookMap, upstream: nn.Module) -> list[Row]:
    """The rows of a hook table, in order, those with marks once for each number that upstream's modules have.

    Neighbouring rows with the same marks take turns: all rows of layer 0, then all of layer 1.

    >>> table = HookMap.parse("{l} : in -> blocks.{l}.hook_resid_pre : batch pos d_model")
    >>> [row.hook for row in numbered(table, nn.Sequential(nn.ReLU(), nn.ReLU()))]
    ['blocks.0.hook_resid_pre', 'blocks.1.hook_resid_pre']

    Raises:
        PrismaError: upstream has no module that fits a row with a mark, or several rows are of one hook point.
    """
    modules = [name for name, _ in cast("Iterator[tuple[str, nn.Module]]", upstream.named_modules())]
    hooks: list[str] = []
    for _, rows in groupby(table.rows, lambda row: set(MARK.findall(row.hook))):
        values: dict[tuple[int, ...], list[str]] = {}
        for row in rows:
            matches = [match for name in modules if (match := pattern_of(row.place.module).fullmatch(name))]
            marks = set(MARK.findall(row.hook))
            if marks and not (matches and marks <= set(MARK.findall(row.place.module))):
                raise PrismaError(
                    f"'{row.place} -> {row.hook}' leaves numbers open: upstream has no module {row.place.module!r} "
                    "for any number. Write the marks where its modules have numbers."
                )
            for each in [match.groupdict() for match in matches] if marks else [{}]:
                values.setdefault(tuple(map(int, each.values())), []).append(bind(row.hook, each))
        hooks += [hook for key in sorted(values) for hook in values[key]]
    return table.bound(hooks)


def check_rows(table: HookMap, points: Collection[str], optional: Collection[str]) -> None:
    """Refuse rows of hook points that no model has (``UnknownName``): nothing would ever read them.

    ``optional`` are hook points of parts that it might have, ``{l}`` and the like in the place of numbers.
    """
    families = set(map(_family, optional))
    for row in table.rows:
        if _family(row.hook) in families or any(map(pattern_of(row.hook).fullmatch, points)):
            continue
        known = {_NUMBER.sub("{l}", name) if "{" in row.hook else name for name in points}
        hint = suggest(row.hook, known)
        raise UnknownName(f"'{row.place} -> {row.hook}': {row.hook} is no hook point of this model.{hint}")


def _family(hook: str) -> str:
    """A hook point's name without its numbers, marks or not."""
    return MARK.sub("{}", _NUMBER.sub("{}", hook))
