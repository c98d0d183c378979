"""The grammar of hook names.

A query is an exact name (``blocks.3.attn.hook_z``), a glob (``blocks.*.hook_resid_post``), a shorthand
(``z``, ``resid_post``, ``ln1.scale``: every hook point whose name ends so, ``hook_`` left out), a shorthand with a
layer (``("z", 3)``, ``("resid_post", -1)``), a predicate over full names, or any collection of those.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import SupportsIndex, TypeAlias, TypeGuard, cast

from prisma_core.errors import UnknownName, suggest

Predicate: TypeAlias = Callable[[str], bool]
LayerQuery: TypeAlias = tuple[str, int]
Query: TypeAlias = "str | LayerQuery | Predicate | Iterable[str | LayerQuery]"

_LAYER = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """Return the layer in a hook name, or None for one outside the blocks.

    >>> layer_of("vision.blocks.3.attn.hook_z")
    3
    """
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def short_name(name: str) -> str:
    """Return the last part of a hook name without ``hook_``.

    >>> short_name("blocks.3.attn.hook_z")
    'z'
    """
    return name.rsplit(".", 1)[-1].removeprefix("hook_")


def _ends_with(name: str, shorthand: str) -> bool:
    *path, last = shorthand.split(".")
    parts = name.split(".")
    if last not in (parts[-1], parts[-1].removeprefix("hook_")):
        return False
    return parts[:-1][len(parts) - 1 - len(path) :] == path


def _shorthand(query: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if _ends_with(name, query)]
    if found or "." not in query:
        return found
    tower, rest = query.split(".", 1)
    return [name for name in names if name.startswith(tower + ".") and _ends_with(name.removeprefix(tower + "."), rest)]


def _unknown(query: object, names: Sequence[str]) -> UnknownName:
    shorthands = sorted({short_name(name) for name in names})
    hint = suggest(query if isinstance(query, str) else repr(query), [*names, *shorthands])
    return UnknownName(
        f"No hook point matches {query!r}.{hint} "
        f"This model has {len(names)} hook points; shorthands: {', '.join(shorthands)}."
    )


def _with_layer(query: LayerQuery, names: Sequence[str]) -> list[str]:
    shorthand, layer = query
    found = _shorthand(shorthand, names)
    if not found:
        raise _unknown(query, names)
    depths: dict[str, int] = {}
    for name in names:
        if (match := _LAYER.search(name)) is not None:
            tower = name[: match.start()]
            depths[tower] = max(depths.get(tower, 0), int(match[1]) + 1)
    places = [(name, name[: match.start()], int(match[1])) for name in found if (match := _LAYER.search(name))]
    if not places:
        raise UnknownName(f"{found[0]} is in no layer: ask for {short_name(found[0])!r} alone.")
    wanted = [name for name, tower, at in places if at == (layer if layer >= 0 else depths[tower] + layer)]
    if not wanted:
        last = max(depths[tower] for _, tower, _ in places) - 1
        raise UnknownName(
            f"No hook point {shorthand!r} in layer {layer}. Layers run from 0 to {last} (or -1 for the last)."
        )
    return wanted


def resolve(query: Query | None, names: Sequence[str], derived: frozenset[str] = frozenset()) -> list[str]:
    """Return the full names a query selects, in the order of ``names``.

    Args:
        query: see the module's docstring; None selects every hook point that is not derived.
        names: all full names of the model, in firing order.
        derived: names of points computed only when asked for by name. A glob or predicate never selects them
            unless the glob spells their last part out (``*hook_result``).

    Raises:
        UnknownName: a part of the query selects nothing.
    """
    if query is None:
        return [name for name in names if name not in derived]
    if isinstance(query, str):
        return _resolve_text(query, names, derived)
    if callable(query):
        found = [name for name in names if name not in derived and query(name)]
        if not found:
            raise UnknownName(f"The predicate {query!r} selects none of this model's {len(names)} hook points.")
        return found
    if _is_layer_query(query):
        return _with_layer(query, names)
    parts = cast(object, query)
    if not isinstance(parts, Iterable):
        raise UnknownName(f"{query!r} is no name, glob, (shorthand, layer), predicate or collection of those.")
    known = set(names)
    selected: set[str] = set()
    for part in cast("Iterable[Query]", parts):
        if isinstance(part, str) and part in known:
            selected.add(part)
        else:
            selected.update(resolve(part, names, derived))
    return [name for name in names if name in selected]


def _is_layer_query(query: object) -> TypeGuard[LayerQuery]:
    if not isinstance(query, tuple):
        return False
    pair = cast("tuple[object, ...]", query)
    return len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], SupportsIndex)


def _resolve_text(query: str, names: Sequence[str], derived: frozenset[str]) -> list[str]:
    if query in names:
        return [query]
    if any(char in query for char in "*?["):
        found = [
            name for name in fnmatch.filter(names, query) if name not in derived or name.rsplit(".", 1)[-1] in query
        ]
    else:
        found = _shorthand(query, names)
    if not found:
        raise _unknown(query, names)
    return found


def resolve_one(query: str | LayerQuery, names: Sequence[str]) -> str:
    """Return the one full name a query selects.

    Raises:
        UnknownName: it selects none, or several.
    """
    found = resolve([query], names)
    if len(found) > 1:
        advice = "Give a full name"
        towers = sorted({name.partition(".")[0] for name in found})
        if not isinstance(query, str) and len(towers) == len(found):
            advice = f"Name a tower, as in ({f'{towers[-1]}.{query[0]}'!r}, {query[1]})"
        elif isinstance(query, str) and layer_of(found[0]) is not None:
            advice = f"Name a layer, as in ({short_name(found[0])!r}, 0)"
        raise UnknownName(f"{query!r} selects {len(found)} hook points ({found[0]}, {found[1]}, ...). {advice}.")
    return found[0]


def tagged(how: str, names: Iterable[str], tag: str) -> str:
    """Return an einops pattern with a tag on each of these axes: two tables may give one axis different lengths.

    >>> tagged("b p (h d) -> b p h d", ["h"], "vision")
    'b p (h_vision d) -> b p h_vision d'
    """
    for name in names if tag else ():
        how = re.sub(rf"\b{name}\b", f"{name}_{tag}", how)
    return how
