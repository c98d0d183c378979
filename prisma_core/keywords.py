"""Keyword arguments that are passed on: refused in words where nothing takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from prisma_core.errors import InputError, suggest

FEW = 15  # so many names are listed next to a suggestion

# Spellings of the same thing elsewhere, and ours.
_OURS = {
    "names_filter": "names=",
    "fwd_hooks": "hooks={name: hook}",
    "bwd_hooks": "backward={name: hook}",
    "incl_bwd": "loss=",
    "pos_slice": "pos=",
}


def keywords(*functions: Callable[..., Any]) -> list[str] | None:
    """Return the names of the keyword arguments that functions take together, or None if one of them takes any."""
    taken: list[str] = []
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return None
        taken += named(function)
    return list(dict.fromkeys(taken))


def named(function: Callable[..., Any]) -> list[str]:
    """Return the names of the keyword arguments that a function spells out."""
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def check_keywords(who: str, given: Iterable[str], taken: Iterable[str] | None) -> None:
    """Refuse keyword arguments that nothing takes.

    Args:
        who: what they were given to.
        given: their names.
        taken: the names there are; None for any.

    Raises:
        InputError: one is not among them; the nearest are suggested.
    """
    if taken is None:
        return
    names = list(taken)
    for name in given:
        if name in names:
            continue
        ours = _OURS.get(name)
        if ours is not None and ours.partition("=")[0] in names:
            raise InputError(f"{who} takes no {name!r}: here it is {ours}.")
        near = suggest(name, names)
        rest = "" if near and len(names) > FEW else f" It takes {', '.join(names) or 'none'}."
        raise InputError(f"{who} takes no {name!r}.{near}{rest}")
