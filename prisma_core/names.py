"""The grammar of hook names.

A query is an exact name (``blocks.3.attn.hook_z``), a glob (``blocks.*.hook_resid_post``), a shorthand
(``z``, ``resid_post``, ``ln1.scale``: every hook point whose name ends so, ``hook_`` left out), a shorthand with a
layer (``("z", 3)``, ``("resid_post", -1)``), a predicate over full names, or any collection of those.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, cast

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
    return parts[: -1][len(parts) - 1 - len(path) :] == path


def _shorthand(query: str, names: Sequence[str]) -> list[str]:
    found = [name for name in names if _ends_with(name, query)]
    if found or "." not in query:
        return found
    tower, rest = query.split(".", 1)
    return [name for name in names if name.startswith(tower + ".") and _ends_with(name.removeprefix(tower + "."), rest)]


def _unknown(query: object, names: Sequence[str]) -> UnknownName:
    shorthands = sorted({short_name(name) for name in names})
    text = query if isinstance(query, str) else repr(query)
    hint = suggest(text, [*names, *shorthands])
    return UnknownName(
        f"No hook point matches {text!r}.{hint} "
        f"This model has {len(names)} hook points; shorthands: {', '.join(shorthands)}."
    )


def _with_layer(query: LayerQuery, names: Sequence[str]) -> list[str]:
    shorthand, layer = query
    found = _shorthand(shorthand, names)
    layers = sorted({n for name in names if (n := layer_of(name)) is not None})
    if not found or not layers:
        raise _unknown(query, names)
    wanted = layer if layer >= 0 else layers[-1] + 1 + layer
    found = [name for name in found if layer_of(name) == wanted]
    if not found:
        raise UnknownName(
            f"No hook point {shorthand!r} in layer {layer}. Layers run from 0 to {layers[-1]} (or -1 for the last)."
        )
    return found


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
    if isinstance(query, tuple):
        pair = cast("tuple[object, ...]", query)
        if len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int):
            return _with_layer((pair[0], pair[1]), names)
    selected = {name for part in query for name in resolve(part, names, derived)}
    return [name for name in names if name in selected]


def _resolve_text(query: str, names: Sequence[str], derived: frozenset[str]) -> list[str]:
    if query in names:
        return [query]
    if any(char in query for char in "*?["):
        found = [
            name
            for name in fnmatch.filter(names, query)
            if name not in derived or name.rsplit(".", 1)[-1] in query
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
        raise UnknownName(
            f"{query!r} selects {len(found)} hook points ({found[0]}, {found[1]}, ...). "
            f"Name a layer, as in ({short_name(found[0])!r}, 0)."
        )
    return found[0]
