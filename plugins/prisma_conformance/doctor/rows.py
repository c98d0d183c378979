"""Changes of single rows of a weight table: other sources, sources exchanged, and rows that are missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import torch

from prisma_conformance.doctor.change import Change
from prisma_conformance.doctor.families import families
from prisma_core.maps.rule import CONSTANTS, Rule
from prisma_core.maps.table import MARK, pattern_of
from prisma_core.plugin import WeightMap

Shapes = Mapping[str, torch.Size]


def rows(table: WeightMap, upstream: Shapes, canonical: Shapes, spare: Collection[str]) -> Iterator[Change]:
    """Yield changes of one row, or of two that exchange their sources.

    Args:
        table: the adapter's.
        upstream, canonical: the shapes of the tensors on both sides.
        spare: upstream's tensors that no row takes.
    """
    constant = [rule for rule in table.rows if rule.function is None and not set(rule.names) - set(CONSTANTS)]
    filled = [name for name in canonical for rule in constant for t in rule.targets if pattern_of(t).fullmatch(name)]
    yield from missing(filled, upstream, canonical, spare)
    yield from _other_targets(table)
    yield from _exchanged(table, upstream)
    yield from _other_sources(table, upstream, spare)


def missing(names: Collection[str], upstream: Shapes, canonical: Shapes, spare: Collection[str]) -> Iterator[Change]:
    """Yield a row for each of these canonical tensors from each of upstream's that no row takes."""
    theirs = families(spare)
    for target, targets in families(names).items():
        for source, sources in theirs.items():
            if not targets.keys() <= sources.keys():
                continue
            shapes = next((upstream[sources[n]], canonical[targets[n]]) for n in targets)
            yield from (_row(f"{source} -> {target}", how) for how in patterns(*shapes))


def missing_modules(
    names: Collection[str], upstream: Shapes, canonical: Shapes, spare: Collection[str]
) -> Iterator[Change]:
    """Yield a row for all tensors of a canonical module, of an upstream module like it."""
    parts, theirs = _parts(names, canonical), _parts(spare, upstream)
    for target, shapes in parts.items():
        yield from (_row(f"{one}.{{*}} -> {target}.{{*}}", "") for one, other in theirs.items() if other == shapes)


def _parts(names: Collection[str], shapes: Shapes) -> dict[str, dict[tuple[str, str], torch.Size]]:
    """By module, ``{l}`` for the layer: the shape of each of its tensors in each layer, where it has several."""
    result: dict[str, dict[tuple[str, str], torch.Size]] = {}
    for family, members in families(names).items():
        part, _, last = family.rpartition(".")
        result.setdefault(part, {}).update({(last, layer): shapes[name] for layer, name in members.items()})
    return {part: tensors for part, tensors in result.items() if len({last for last, _ in tensors}) > 1 and part}


def reshaped(names: Collection[str], table: WeightMap, upstream: Shapes, canonical: Shapes) -> Iterator[Change]:
    """Yield the rows of these canonical tensors with an einops pattern that makes the shape fit."""
    for target, targets in families(names).items():
        name = next(iter(targets.values()))
        for rule in table.rows:
            match = next((m for t in rule.targets if (m := pattern_of(t).fullmatch(name))), None)
            bound = rule.bind(match.groupdict()) if match is not None else rule
            sources = [one for one in bound.names if one in upstream] if match is not None else []
            if len(sources) == len(bound.targets) == 1 and rule.function is None:
                source = next((f for f, members in families(upstream).items() if sources[0] in members.values()), "")
                for how in patterns(upstream[sources[0]], canonical[name]):
                    yield _row(f"{source} -> {target}", how)


def extended(
    names: Collection[str], table: WeightMap, upstream: Shapes, canonical: Shapes, others: Collection[str]
) -> Iterator[Change]:
    """Yield the rows of these canonical tensors with one more source, where that makes their size.

    Args:
        others: the sources: upstream's tensors, and ``zeros``.
    """
    sizes = {family: {upstream[one].numel() for one in members.values() if one in upstream}
             for family, members in families(others).items()}  # fmt: skip
    for target, targets in families(names).items():
        name = next(iter(targets.values()))
        matches = ((rule, m) for rule in table.rows for t in rule.targets if (m := pattern_of(t).fullmatch(name)))
        for rule, match in matches:
            sources = [one for one in rule.bind(match.groupdict()).names if one in upstream]
            lack = canonical[name].numel() - sum(upstream[one].numel() for one in sources)
            if rule.function is not None or rule.patterns or len(rule.targets) > 1 or not sources or lack <= 0:
                continue
            now = [" | ".join(options).replace("{*}", match.groupdict().get("rest", "")) for options in rule.sources]
            how = rule.how or _without_ones(upstream[sources[0]])
            for other, size in sizes.items():
                if other not in now and (size <= {lack}) and set(MARK.findall(other)) <= set(MARK.findall(target)):
                    yield from (_joined(several, how, target) for several in ([*now, other], [other, *now]))


def _joined(sources: list[str], how: str, target: str) -> Change:
    """The row that joins sources, each by a pattern; what is made needs none."""
    shown = [f"{one} : {how}" if how and one not in CONSTANTS else one for one in sources]
    return _row(f"[{', '.join(shown)}] -> {target}", "")


def _without_ones(shape: torch.Size) -> str:
    """The pattern that leaves out axes of length one; none if there are none."""
    axes = ["1" if size == 1 else axis for axis, size in zip("abcdef", shape, strict=False)]
    long = [axis for axis in axes if axis != "1"]
    return f"{' '.join(axes)} -> {' '.join(long)}" if len(long) < len(axes) else ""


def patterns(source: torch.Size, target: torch.Size) -> list[str]:
    """The einops patterns that turn one shape into another by axes taken away, added or in another order."""
    axes = "abcdef"[: len(source)]
    left = [axis if size > 1 else "1" for axis, size in zip(axes, source, strict=True)]
    long = [axis for axis in left if axis != "1"]
    result: list[str] = []
    for order in permutations(long):
        sizes = [source[axes.index(axis)] for axis in order]
        if sizes != [size for size in target if size > 1]:
            continue
        rest = iter(order)
        right = [next(rest) if size > 1 else "1" for size in target]
        result.append("" if left == right else f"{' '.join(left)} -> {' '.join(right)}")
    return sorted(result, key=len)


def _row(row: str, how: str) -> Change:
    rule = Rule.parse(f"{row} : {how}" if how else row)

    def change(table: WeightMap) -> WeightMap:
        # A row of its own for these targets comes first, and what others make of them is left out.
        return replace(table, rows=(rule, *table.without(*rule.targets).rows))

    return Change(f"the row '{rule}'", table=change)


# -------------------------------------------------------------------- rows that are there


def _other_targets(table: WeightMap) -> Iterator[Change]:
    for index, rule in enumerate(table.rows):
        for order in list(permutations(rule.targets))[1:]:
            changed = replace(rule, targets=order)
            yield Change(f"the row '{changed}' (it is '{rule}')", table=_with({index: changed}))


def _exchanged(table: WeightMap, upstream: Shapes) -> Iterator[Change]:
    """Exchange two sources of one shape, in one row or in two."""
    places = [(i, j) for i, rule in enumerate(table.rows) for j in range(len(rule.sources))]
    for (i, j), (k, m) in combinations(places, 2):
        one, other = table.rows[i].sources[j], table.rows[k].sources[m]
        if one == other or (i != k and not _shapes(one, upstream) == _shapes(other, upstream) != set()):
            continue
        if i == k:
            changed = {i: _source(_source(table.rows[i], j, other), m, one)}
        else:
            changed = {i: _source(table.rows[i], j, other), k: _source(table.rows[k], m, one)}
        said = " and ".join(f"'{rule}'" for rule in changed.values())
        were = " and ".join(f"'{table.rows[index]}'" for index in changed)
        yield Change(f"the row{'s' if len(changed) > 1 else ''} {said} (instead of {were})", table=_with(changed))


def _other_sources(table: WeightMap, upstream: Shapes, spare: Collection[str]) -> Iterator[Change]:
    """Take tensors that no row takes for those that a row takes, or for constants among them."""
    untaken = {name: upstream[name] for name in spare}
    names = [each for name in families(spare) for each in (name, f"{name.rpartition('.')[0]}.{{*}}")]
    for index, rule in enumerate(table.rows):
        marks = {mark for target in rule.targets for mark in MARK.findall(target)}
        for j, options in enumerate(rule.sources):
            for source in dict.fromkeys(names):
                constant = options[0] in CONSTANTS and len(rule.sources) > 1
                shapes = _shapes((source,), untaken)
                if shapes and (constant or shapes == _shapes(options, upstream)) and set(MARK.findall(source)) <= marks:
                    changed = _source(rule, j, (source,))
                    yield Change(f"the row '{changed}' (it is '{rule}')", table=_with({index: changed}))


def _source(rule: Rule, place: int, options: tuple[str, ...]) -> Rule:
    return replace(rule, sources=(*rule.sources[:place], options, *rule.sources[place + 1 :]))


def _shapes(options: tuple[str, ...], upstream: Shapes) -> set[tuple[str, torch.Size]]:
    """What the marks of a source stand for, with the shape of that tensor."""
    found: set[tuple[str, torch.Size]] = set()
    for option in options:
        for name, shape in upstream.items():
            if match := pattern_of(option).fullmatch(name):
                found.add((str(sorted(match.groupdict().items())), shape))
    return found


def _with(changed: Mapping[int, Rule]) -> Callable[[Any], Any]:
    """Return the change of a table that replaces rows by their number."""

    def change(table: WeightMap) -> WeightMap:
        return replace(table, rows=tuple(changed.get(index, rule) for index, rule in enumerate(table.rows)))

    return change


__all__ = ["missing", "patterns", "reshaped", "rows"]
