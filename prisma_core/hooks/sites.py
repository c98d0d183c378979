"""The hook points of a model by name: what queries and mappings select, and what splices add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor, nn

from prisma_core.errors import HookError
from prisma_core.errors.arguments import check_call, expect
from prisma_core.hooks.point import (
    Capture,
    Hook,
    HookContext,
    HookPoint,
    Placed,
    PlacedSplice,
    Scope,
    Splice,
    check_hook,
)
from prisma_core.hooks.query import LayerQuery, Query, resolve, resolve_one

HookMapping = Mapping[str | LayerQuery, Hook]


class Site(NamedTuple):
    """A hook point, and the innermost hooked model that it lies in."""

    point: HookPoint
    owner: nn.Module


def select(sites: Mapping[str, Site], query: Query | None) -> list[str]:
    return resolve(query, list(sites), frozenset(name for name, site in sites.items() if site.point.derived))


def by_name(sites: Mapping[str, Site], hooks: HookMapping | None) -> Iterator[tuple[str, Hook]]:
    """Yield each hook with the full names that its query selects."""
    mapping = cast(object, hooks)
    if not isinstance(mapping, Mapping | None):
        pairs = " Of a list of pairs, dict(pairs) makes one." if type(mapping) in (list, tuple) else ""
        raise HookError(f"Expected hooks as {{name: hook}}, got {type(mapping).__name__}.{pairs}")
    for query, hook in (hooks or {}).items():
        check_hook(query, hook)
        for name in select(sites, [query]):
            yield name, hook


@dataclass(eq=False)
class PlacedRead(Placed):
    """A function that reads an activation on behalf of a splice elsewhere."""

    read: Capture

    def __call__(self, x: Tensor) -> None:
        self.reached = True
        self.read(x.clone())


def with_splices(
    sites: Mapping[str, Site], splices: Sequence[Mapping[str, PlacedSplice]]
) -> Iterator[tuple[str, Site]]:
    """Yield hook points with those of open splices, which fire before the one that the splice is at."""
    for name, site in sites.items():
        for by_key in splices:
            if (placed := by_key.get(site.point.key)) is not None:
                for sub, point in placed.splice.points.items():
                    yield f"{name}.{sub}", Site(point, site.owner)
        yield name, site


def splicing_scope(
    sites: Mapping[str, Site], splices: Mapping[str | LayerQuery, Splice], reads: Mapping[str | LayerQuery, Capture]
) -> Scope:
    """Return a scope with splices, and with what reads for them.

    Raises:
        UnknownName: a name matches no hook point, or several.
        HookError: a hook point is spliced already.
    """
    scope = Scope(frozenset(site.point for site in sites.values()))
    for mapping, what in ((splices, "splices as {name: splice}"), (reads, "reads as {name: function}")):
        expect(mapping, Mapping, what, HookError)
    for query, splice in splices.items():
        check_call(splice, 1, f"The splice for {query!r}", "splice(activation), hook points in .points", HookError)
        expect(getattr(splice, "points", None), Mapping, f"hook points by name in .points of {splice!r}", HookError)
        name = resolve_one(query, list(sites))
        taken = [sub for sub in splice.points if f"{name}.{sub}" in sites]
        if taken or sites[name].point.key in scope.splices:
            raise HookError(f"{name} is spliced already{f', and has {taken[0]}' if taken else ''}: leave that scope.")
        placed = scope.splices[sites[name].point.key] = PlacedSplice(HookContext(name, sites[name].point.axes), splice)
        scope.points |= frozenset(splice.points.values())
        scope.expect(placed, sites[name].owner)
    for query, read in reads.items():
        check_call(read, 1, f"What reads {query!r}", "read(activation)", HookError)
        name = resolve_one(query, list(sites))
        point, owner = sites[name]
        reader = PlacedRead(HookContext(name, point.axes), read)
        scope.captures[point.key] = (*scope.captures.get(point.key, ()), reader)
        scope.expect(reader, owner)
    return scope
