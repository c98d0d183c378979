"""Texts and JSON in files, read with one error for all that can be wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from prisma_core.errors import LoadError, format_fields

Kind = TypeVar("Kind", bound=BaseModel)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def check_regular(path: Path) -> None:
    """Refuse a pipe, a socket or a device in the place of a file: reading it might never end.

    Raises:
        LoadError: it is one.
    """
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):
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
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says {next(name for name in fields if names.count(name) > 1)[:200]!r} twice")
    return fields


def read_fields(kind: type[Kind], facts: Mapping[str, Any], wrong: str) -> Kind:
    """Return facts of a file, each of the very type that its field has: no text for a number, no number for a flag.

    Args:
        wrong: the first words of the message, such as ``FILE does not describe a model``.

    Raises:
        LoadError: a field is missing, unknown, or of another type or value.
    """
    try:
        return kind.model_validate_json(json.dumps(facts), strict=True)
    except ValidationError as error:
        raise LoadError(f"{wrong}: {format_fields(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{wrong}: {error}.") from error


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


def facts_digest(facts: Mapping[str, Any]) -> str:
    """Return a SHA-256 of an object of JSON, however it is written."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_facts(facts: Mapping[str, Any], sha256: str | None, path: Path, key: str) -> None:
    """Refuse a file whose facts are not those that were written.

    Args:
        facts: what it says, without the digest.
        sha256: the ``facts_digest`` it was written with; None in files that are older than that.
        key: where in the file the digest stands, for the message.

    Raises:
        LoadError: they are others.
    """
    if sha256 not in (None, facts_digest(facts)):
        raise LoadError(
            f"{path} says something else than when it was written: save it again. If you changed it yourself, remove "
            f"{key} from it."
        )
