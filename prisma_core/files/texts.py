"""Texts and JSON in files, read with one error for all that can be wrong with them."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from prisma_core.errors import LoadError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_regular(path: Path) -> None:
    """Refuse a file that may not be read, and a pipe, a socket or a device, whose reading might never end.

    Raises:
        LoadError: it is one.
    """
    try:
        if stat.S_ISREG(mode := os.stat(path).st_mode):
            with open(path, "rb") as file:
                file.read(1)
    except (FileNotFoundError, NotADirectoryError):
        return  # who reads it says what is missing
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror}.") from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise LoadError(f"{path} is no regular file, but a pipe, a socket or a device: expected a file on a disk.")


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        LoadError: there is no such file, it is no regular one, or no text.
    """
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LoadError(f"No file at {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise LoadError(f"{path} cannot be read: {reason}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file of JSON.

    Raises:
        LoadError: there is no such file, or it holds no JSON, JSON nested too deeply, or no object.
    """
    return parse_json(read_text(path), path)


def parse_json(text: str | bytes, where: object) -> dict[str, Any]:
    """Return the object that a text of JSON holds.

    Raises:
        LoadError: it holds something else, or an object that names a field twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if _SURROGATE.search(text if isinstance(text, str) else text.decode("latin-1")):
            json.dumps(value, ensure_ascii=False).encode()  # halves of a letter can be neither written nor shown
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{where} is no readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise LoadError(f"{where} holds a {type(value).__name__}; expected a JSON object.")
    return value  # pyright: ignore[reportUnknownVariableType]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"it says {name[:200]!r} twice")
        fields[name] = value
    return fields


def leaves(value: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the values in an object of JSON that hold no others, each with the keys that lead to it."""
    rest: list[tuple[tuple[str, ...], object]] = [((), value)]
    for keys, one in rest:  # it grows meanwhile
        if isinstance(one, Mapping):
            rest += [((*keys, str(key)), each) for key, each in cast("Mapping[object, object]", one).items()]
        elif isinstance(one, list | tuple):
            rest += [(keys, each) for each in cast("list[object]", one)]
        else:
            yield keys, one
