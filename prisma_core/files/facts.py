"""Facts in files: read into what they describe, each of its own type, and told from those that were changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from prisma_core.errors import LoadError, format_fields

Kind = TypeVar("Kind", bound=BaseModel)


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
