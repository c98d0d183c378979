"""Texts and JSON in files, read with one error for all that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prisma_core.errors import LoadError


def check_regular(path: Path) -> None:
    """Refuse a pipe, a socket or a device in the place of a file (``LoadError``): reading it might never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise LoadError(f"{path} is no regular file, but a pipe, a socket or a device: expected a file on a disk.")


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        LoadError: it is no regular file.
        OSError, UnicodeDecodeError: as ``Path.read_text``.
    """
    check_regular(path)
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file of JSON.

    Raises:
        LoadError: there is no such file, or it holds no JSON, JSON nested too deeply, or no object.
    """
    try:
        return parse_json(read_text(path), path)
    except FileNotFoundError as error:
        raise LoadError(f"No file at {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise LoadError(f"{path} is no readable JSON: {reason}.") from error


def parse_json(text: str | bytes, where: object) -> dict[str, Any]:
    """Return the object that a text of JSON holds.

    Raises:
        LoadError: it holds something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{where} is no readable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise LoadError(f"{where} holds a {type(value).__name__}; expected a JSON object.")
    return value  # pyright: ignore[reportUnknownVariableType]
