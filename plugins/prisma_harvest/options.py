"""Options of commands: hook points, tokens and data as they are written on a command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prisma_core.plugin import InputError, LoadError, PluginError, blaming, installed


def read_name(text: str) -> Any:
    """Read a name: ``resid_post:5`` is ``("resid_post", 5)``."""
    name, colon, layer = text.rpartition(":")
    return (name, int(layer)) if colon and layer.removeprefix("-").isdecimal() else text


def read_pos(text: str | None) -> Any:
    """Read tokens: a subset's name, or positions."""
    if text is None or text == "all":
        return None
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.removeprefix("-").isdecimal() for part in parts) else text


def read_source(text: str, reference: str) -> Any:
    """Read a source of data (see ``--data``).

    Raises:
        InputError: it is none.
        LoadError: the library datasets cannot load it.
        PluginError: the library datasets is needed and not installed.
    """
    kind, colon, rest = text.partition(":")
    if colon and kind == "samples":
        if not rest.isdecimal() or int(rest) < 1:
            raise InputError(f"Expected samples:N with a number of images, got {text!r}.")
        source, _, name = reference.partition(":")
        return Samples(source, name, int(rest))
    if colon and kind == "hf":
        name, _, split = rest.partition(":")
        if not name:
            raise InputError(f"Expected hf:NAME or hf:NAME:SPLIT, got {text!r}.")
        return _loaded(_datasets().load_dataset, name, split=split or "train")
    if (Path(text) / "dataset_info.json").is_file() and (Path(text) / "state.json").is_file():
        return _loaded(_datasets().load_from_disk, text)
    return text


def _loaded(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with blaming(function, "The library datasets", LoadError):
        return function(*arguments, **options)


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise PluginError("hf: needs the library datasets, which is not installed: pip install datasets") from error


@dataclass(frozen=True)
class Samples:
    """Images that a source draws, of the kind a model was made for: one for each seed."""

    source: str
    name: str
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, seed: int) -> Any:
        image = installed().source(self.source).sample(self.name, seed)
        if image is None:
            raise LoadError(f"The source {self.source!r} draws no images: give --data a folder.")
        return {"image": image, "path": f"{self.source}:{self.name} sample {seed}"}
