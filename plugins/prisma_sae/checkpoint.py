"""A training so far, in a file that belongs to it alone, so that whatever stops it can be gone on from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path

from prisma_core import InputError, LoadError
from prisma_core.plugin import Facts, digest, facts_digest, read_objects, replacing, save_objects

SAVE_EVERY = 30.0  # seconds


class Run(Protocol):
    """A coder in training, whose state can be kept."""

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Checkpoint:
    """The file of one training.

    Args:
        path: the file.
        configs: what is trained, by name.
        steps: of the whole training: learning rates depend on it.
        first: the first batch, which tells rows from others.

    Raises:
        InputError: the file has another ending than ``.pt``.
    """

    def __init__(self, path: Path, configs: Mapping[str, Facts], steps: int, first: Tensor):
        if path.suffix != ".pt":
            raise InputError(f"Expected a path that ends in .pt to resume from, got {path}.")
        self.path, self.steps, self.last = path, steps, time.monotonic()
        said = [steps, {name: each.model_dump(mode="json") for name, each in configs.items()}]
        self.mark = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        self.first, self.batch = digest({"": first}), ""

    def read(self, runs: Mapping[str, Run]) -> int:
        """Put the coders back to where they were, and return how many steps were taken: 0 where there is no file.

        Raises:
            LoadError: the file is damaged, or of another training.
        """
        if not self.path.is_file():
            return 0
        try:
            kept = read_objects(self.path)
            if not isinstance(kept, dict) or kept.pop("sha256", None) != _seal(kept):
                raise ValueError("it is not what was written")
            same = (kept["mark"], kept["first"]) == (self.mark, self.first)
            if same:
                self.batch = kept["batch"]
                for name, run in runs.items():
                    run.restore(kept["runs"][name])
                return kept["step"]
        except LoadError as error:
            raise LoadError(f"{error} Remove it to begin anew.") from error
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise LoadError(f"{self.path} cannot be read: {said}. Remove it to begin anew.") from error
        raise LoadError(f"{self.path} is of another training or other rows: choose another file, or remove it.")

    def compare(self, batch: Tensor) -> None:
        """Hold the last batch that was trained on against the one that came now in its place.

        Raises:
            LoadError: they differ.
        """
        if digest({"": batch}) != self.batch:
            raise LoadError(f"{self.path} is of rows in another order: give the same ones, or remove it to begin anew.")

    def write(self, runs: Mapping[str, Run], step: int, batch: Tensor) -> None:
        """Keep the state behind a step, unless that was just done; the last one always."""
        if step < self.steps and time.monotonic() - self.last < SAVE_EVERY:
            return
        states = {name: run.state() for name, run in runs.items()}
        facts: dict[str, Any] = {"mark": self.mark, "first": self.first, "batch": digest({"": batch})}
        facts |= {"step": step, "runs": states}
        facts["sha256"] = _seal(facts)
        with replacing(self.path) as beside:
            save_objects(facts, beside)
        self.last = time.monotonic()


def _seal(kept: Mapping[str, Any]) -> str:
    """Return a digest of all that a training goes on from."""
    leaves = {keystr(path): leaf for path, leaf in tree_leaves_with_path(kept)}
    tensors = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    others = {path: repr(leaf) for path, leaf in leaves.items() if path not in tensors}
    return facts_digest({"tensors": digest(tensors), "others": others})
