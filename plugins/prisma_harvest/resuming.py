"""A search so far, in a file that belongs to it alone, so that whatever stops it can be gone on from."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prisma_core import InputError, LoadError
from prisma_core.plugin import digest, facts_digest, parse_json, replacing
from prisma_harvest.manifest import Manifest, Point
from prisma_harvest.passes import Pass
from prisma_harvest.reading import Harvest
from prisma_harvest.scoring import Units

SAVE_EVERY = 20.0  # seconds


class Search(Protocol):
    """What is kept of a search: tensors, how many examples and groups of them were seen, lines of examples."""

    state: dict[str, Tensor]
    seen: int
    groups: int
    lines: dict[int, dict[str, Any]]


def mark(source: Harvest | Pass, point: Point, units: Units, k: int, per: str) -> str:
    """Return a hash that two searches share if they are the same."""
    of = (
        [Manifest.read(folder).name for folder in source.folders]  # a folder may be called as one likes
        if isinstance(source, Harvest)
        else [source.manifest("float32", 1).name]
    )
    text = json.dumps([of, point.name, k, per, units.axis])
    return hashlib.sha256(text.encode() + units.mark()).hexdigest()


class Kept:
    """The file of one search.

    Args:
        path: the file.
        mark: of the search.

    Raises:
        InputError: the file has another ending than ``.safetensors``.
    """

    def __init__(self, path: Path, mark: str):
        if path.suffix != ".safetensors":
            raise InputError(f"Expected a path that ends in .safetensors to resume from, got {path}.")
        self.path, self.mark, self.last = path, mark, time.monotonic()

    def read(self, search: Search) -> None:
        """Put what was found so far into a search, if there is any.

        Raises:
            LoadError: the file is damaged, or of another search.
        """
        if not self.path.is_file():
            return
        try:
            with safe_open(self.path, "pt") as file:
                facts = parse_json((file.metadata() or {}).get("top_examples", "{}"), self.path)
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            if facts.get("mark") != self.mark:
                raise LoadError(f"{self.path} is of another search: choose another file, or remove it.")
            if facts.pop("sha256", None) != _seal(facts, state):
                raise ValueError("it is not what was written")
        except (OSError, SafetensorError, ValueError) as error:
            raise LoadError(f"{self.path} cannot be read: {error}. Remove it to begin anew.") from error
        search.state, search.seen, search.groups = state, facts["seen"], facts["groups"]
        search.lines = {int(example): line for example, line in facts["lines"].items()}

    def write(self, search: Search, *, now: bool = False) -> None:
        """Write the search, unless that was just done."""
        if not now and time.monotonic() - self.last < SAVE_EVERY:
            return
        lines = {str(example): line for example, line in search.lines.items()}
        facts: dict[str, Any] = {"mark": self.mark, "seen": search.seen, "groups": search.groups, "lines": lines}
        state = {name: x.contiguous() for name, x in search.state.items()}
        facts["sha256"] = _seal(facts, state)
        with replacing(self.path) as beside:
            save_file(state, beside, {"top_examples": json.dumps(facts)})
        self.last = time.monotonic()


def _seal(facts: dict[str, Any], state: dict[str, Tensor]) -> str:
    """Return a digest of all that a search goes on from."""
    return facts_digest({"facts": facts, "state": digest(state)})
