"""The grammar of hook names.

A query is an exact name (``blocks.3.attn.hook_z``), a glob (``blocks.*.hook_resid_post``), a shorthand
(``z``, ``resid_post``, ``ln1.scale``: every hook point whose name ends so, ``hook_`` left out), a shorthand with a
layer (``("z", 3)``, ``("resid_post", -1)``, ``("embed", None)`` outside the blocks) and with a part of the block
(``("scale", 3, "ln1")``), a predicate over full names, or any collection of those.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, TypeGuard, cast

from torch import nn

from prisma_core.errors import UnknownName, suggest
from prisma_core.errors.arguments import check_call, shown, whole

Predicate: TypeAlias = Callable[[str], bool]
LayerQuery: TypeAlias = tuple[str, int | None] | tuple[str, int | None, str | None]
Query: TypeAlias = str | LayerQuery | Predicate | Iterable[str | LayerQuery]

_LAYER = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_PARTS = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}  # TransformerLens' letters


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


def resolve(query: Query | None, names: Sequence[str], derived: frozenset[str] = frozenset()) -> list[str]:
    """Return the full names a query selects, in the order of ``names``.

    Args:
        query: see the module's docstring; None selects every hook point that is not derived.
        names: all full names of the model, in firing order.
        derived: names of points computed only when asked for by name. A glob or predicate never selects them
            unless the glob spells their last part out (``*hook_result``).

    Raises:
        UnknownName: a part of the query selects nothing.

    >>> resolve(("scale", -1, "ln1"), ["hook_embed", "blocks.0.ln1.hook_scale", "blocks.0.ln2.hook_scale"])
    ['blocks.0.ln1.hook_scale']
    """
    if query is None:
        return [name for name in names if name not in derived]
    if isinstance(query, str):
        return _resolve_text(query, names, derived)
    if callable(query) and not isinstance(query, nn.Module):
        check_call(query, 1, "The predicate", "predicate(name) -> bool", UnknownName)
        answers: dict[str, object] = {name: query(name) for name in names if name not in derived}
        if any(isinstance(answer, str) for answer in answers.values()):  # a hook point returns what it is given
            raise _no_query(query)
        if not any(answers.values()):
            why = " Derived points are asked for by name, and by no predicate." if any(map(query, derived)) else ""
            raise UnknownName(f"The predicate {query!r} selects none of this model's {len(names)} hook points.{why}")
        return [name for name, answer in answers.items() if answer]
    if _is_layer_query(query):
        return _with_layer(query, names)
    try:
        parts = iter(cast("Iterable[Query]", query))
    except TypeError as error:
        raise _no_query(query) from error
    known, union = set(names), set[str]()
    try:
        for part in parts:
            if cast(object, part) is None:
                raise _no_query(part)
            union.update([part] if isinstance(part, str) and part in known else resolve(part, names, derived))
    except RecursionError as error:  # a list that holds itself
        raise _no_query(query) from error
    return [name for name in names if name in union]


def resolve_one(query: str | LayerQuery, names: Sequence[str]) -> str:
    """Return the one full name a query selects.

    Raises:
        UnknownName: it selects none, or several; with a key that selects one.
    """
    selected = resolve([query], names)
    if not selected:
        raise _no_query(query)
    if len(selected) > 1:
        number = f"{len(selected)} hook points ({selected[0]}, {selected[1]}, ...)"
        raise UnknownName(f"{query!r} selects {number}. {_one_of(query, selected, names)}")
    return selected[0]


def _one_of(query: str | LayerQuery, selected: Sequence[str], names: Sequence[str]) -> str:
    """Return the advice that names the shortest key of one of several selected hook points."""
    name, short = selected[0], short_name(selected[0])
    if match := _LAYER.search(name):
        layer = whole(query[1]) if _is_layer_query(query) else int(match[1])
        part = name[match.end() :].rpartition(".")[0]
        for tower in ("", name[: match.start()]):
            shorthand = f"{tower}.{short}" if tower else short
            for key in ((shorthand, layer), (shorthand, layer, part)):
                if _shorthand(shorthand, names) and resolve(key, names) in ([each] for each in selected):
                    text = not _is_layer_query(query)
                    kinds = {"tower": tower, "layer": text, "part": len(key) > (2 if text else len(query))}
                    return f"Name a {' and a '.join(kind for kind in kinds if kinds[kind])}, as in {key!r}."
    return f"Give a full name, such as {name!r}."


def _resolve_text(query: str, names: Sequence[str], derived: frozenset[str]) -> list[str]:
    if query in names:
        return [query]
    if any(char in query for char in "*?["):
        found = fnmatch.filter(names, query)
        selected = [name for name in found if name not in derived or name.rsplit(".", 1)[-1] in query]
    else:
        selected = _shorthand(query, names)
    if not selected:
        raise _unknown(query, names)
    return selected


def _shorthand(query: str, names: Sequence[str]) -> list[str]:
    last = query.rpartition(".")[2]
    selected = [name for name in names if name.endswith(last) and _ends_with(name, query)]
    if selected or "." not in query:
        return selected
    tower, rest = query.split(".", 1)
    return [name for name in names if name.startswith(tower + ".") and _ends_with(name.removeprefix(tower + "."), rest)]


def _ends_with(name: str, shorthand: str) -> bool:
    *path, last = shorthand.split(".")
    parts = name.split(".")
    if last not in (parts[-1], parts[-1].removeprefix("hook_")):
        return False
    return parts[:-1][len(parts) - 1 - len(path) :] == path


def _is_layer_query(query: object) -> TypeGuard[LayerQuery]:
    if not isinstance(query, tuple):
        return False
    shorthand, *rest = cast("tuple[object, ...]", query) or (None,)
    layer, part = [*rest, None, None][:2]
    numbered = (layer is None or whole(layer) is not None) and isinstance(part, str | None)
    return isinstance(shorthand, str) and len(rest) in (1, 2) and numbered


def _with_layer(query: LayerQuery, names: Sequence[str]) -> list[str]:
    shorthand, layer, part = query[0], whole(query[1]), query[2] if len(query) == 3 else None
    if part := _PARTS.get(part or "", part):
        tower, _, short = shorthand.rpartition(".")
        shorthand = ".".join(filter(None, [tower, part, short]))
    selected = _shorthand(shorthand, names)
    if not selected:
        raise _unknown(query, names)
    if layer is None:
        if outside := [name for name in selected if layer_of(name) is None]:
            return outside
        raise UnknownName(f"{selected[0]} is in a layer: ask for ({short_name(selected[0])!r}, LAYER).")
    depths: dict[str, int] = {}
    for name in names:
        if (match := _LAYER.search(name)) is not None:
            tower = name[: match.start()]
            depths[tower] = max(depths.get(tower, 0), int(match[1]) + 1)
    places = [(name, name[: match.start()], int(match[1])) for name in selected if (match := _LAYER.search(name))]
    if not places:
        raise UnknownName(f"{selected[0]} is in no layer: ask for {shorthand!r} alone.")
    in_layer = [name for name, tower, at in places if at == (layer if layer >= 0 else depths[tower] + layer)]
    if not in_layer:
        last = max(depths[tower] for _, tower, _ in places) - 1
        raise UnknownName(
            f"No hook point {shorthand!r} in layer {layer}. Layers run from 0 to {last} (or -1 for the last)."
        )
    return in_layer


def _unknown(query: object, names: Sequence[str]) -> UnknownName:
    shorthands = sorted({short_name(name) for name in names})
    hint = suggest(query if isinstance(query, str) else repr(query), [*names, *shorthands])
    return UnknownName(
        f"No hook point matches {query!r}.{hint} "
        f"This model has {len(names)} hook points; shorthands: {', '.join(shorthands)}."
    )


def _no_query(query: object) -> UnknownName:
    return UnknownName(
        f"{shown(query)} is no name, glob, (shorthand, layer), predicate or collection of those. "
        "A cache takes cache['resid_post', 0]; of layer norms cache['scale', 0, 'ln1']."
    )
