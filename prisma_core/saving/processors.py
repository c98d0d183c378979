"""Tokenizers and image processors of other libraries, in folders beside a model's weights."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prisma_core.errors import LoadError, PrismaError, format_error
from prisma_core.files.atomic import file_digest, place
from prisma_core.host import installed
from prisma_core.inputs import fingerprint
from prisma_core.model import LazyProcessor, MissingProcessor, ZooModel
from prisma_core.saving.facts import SavedProcessor
from prisma_core.spec import Facts

# Texts that tell tokenizers apart: case, accents, other scripts, spaces, what is cut and what fills up.
TEXTS = ("a photo of a cat.", " Zwei  Äpfel, 3 DON'TS & 猫🐈\n</s>", "", "again and again, " * 200)
# The attributes of models that hold processors, with a function to try one: equal results mean equal processors.
TRIALS: Mapping[str, Callable[[Any], Tensor]] = {"tokenizer": lambda it: it(list(TEXTS)), "preprocess": fingerprint}


@dataclass(frozen=True)
class ProcessorFolder(LazyProcessor):
    """A processor that lies in a folder beside saved weights."""

    what: str
    record: SavedProcessor
    home: Path

    def make(self) -> Any:
        """Return the processor, made by the source that wrote it."""
        return _read(str(self.record.source), self.folder())

    def folder(self) -> Path:
        """Return where the files are; a ``LoadError`` where they are not those that were saved."""
        folder = place(self.home, self.what, self.record.sha256)
        if not folder.is_dir() or self.record.sha256 not in (None, digest(folder)):
            raise LoadError(
                f"The {self.what} in {folder} is not there, or changed since the model was loaded or saved. Load the "
                f"model again, or set model.{self.what}."
            )
        return folder


def digest(folder: Path) -> str:
    """Return a SHA-256 of the names and contents of all files in a folder.

    Raises:
        LoadError: there is a link among them, which may lead anywhere.
    """
    total = hashlib.sha256()
    for path in (folder, *sorted(folder.rglob("*"))):
        if path.is_symlink():
            raise LoadError(f"{path} is a link, which may lead anywhere: expected files alone.")
        if path.is_file():
            total.update(f"{path.relative_to(folder)}\0{file_digest(path)}\0".encode())
    return total.hexdigest()


def write(model: ZooModel, home: Path) -> dict[Any, SavedProcessor]:
    """Write a model's processors, each into a folder named after its attribute; return a record of each.

    Warns of each that cannot be written, and of each that does something else when it is read again.
    """
    records: dict[Any, SavedProcessor] = {}
    for what, processor in _processors(model).items():
        try:
            if isinstance(processor, MissingProcessor):
                raise LoadError(str(processor.lost))
            records[what] = _write(what, processor, home / what)
        except Exception as error:  # noqa: BLE001  # another library's code, or the user's; the weights are saved all the same
            why = (str(error) if isinstance(error, PrismaError) else format_error(error)).rstrip(".")
            shutil.rmtree(home / what, ignore_errors=True)
            records[what] = SavedProcessor(lost=why)
            warnings.warn(f"The {what} is not saved with the model: {why}.", stacklevel=4)
    return records


def read(records: Mapping[Any, SavedProcessor], home: Path) -> dict[str, ProcessorFolder | MissingProcessor]:
    """Return the processors that ``write`` wrote, none of them made yet."""

    def one(what: str, record: SavedProcessor) -> ProcessorFolder | MissingProcessor:
        if record.source is not None:
            return ProcessorFolder(what, record, home)
        why = f"The {what} was not saved with this model: {record.lost}. Set model.{what} again."
        return MissingProcessor(why, record.lost)

    return {what: one(what, record) for what, record in records.items()}


def _processors(model: ZooModel) -> dict[str, Any]:
    """Return the processors to write: those that are data stand in the JSON, unset ones are left out."""
    held = [(what, vars(tower).get(what)) for tower in model.towers().values() for what in TRIALS]
    unset = (type(None), Facts)
    return {what: each for what, each in held if not isinstance(each, unset) and getattr(each, "lost", True)}


def _write(what: str, processor: Any, folder: Path) -> SavedProcessor:
    """Write one processor; a ``PrismaError`` where no source does, or what it reads does something else."""
    if isinstance(processor, ProcessorFolder):
        shutil.copytree(processor.folder(), folder)
        return processor.record.model_copy(update={"sha256": digest(folder)})
    source = installed().source_of(processor)
    if source is None:
        name = getattr(processor, "__qualname__", type(processor).__qualname__)
        module = getattr(processor, "__module__", type(processor).__module__)
        raise LoadError(f"no source of an installed plugin saves {module}.{name}")
    folder.mkdir()
    source.save_processor(processor, folder)
    if not torch.equal(TRIALS[what](processor), TRIALS[what](_read(source.name, folder))):
        raise LoadError(f"the source {source.name!r} does not read back what it wrote")
    return SavedProcessor(source=source.name, sha256=digest(folder))


def _read(source: str, folder: Path) -> Any:
    reader = installed().source(source)
    try:
        return reader.load_processor(folder)
    except PrismaError:
        raise
    except Exception as problem:  # a broken file is one error, whichever library reads it
        raise LoadError(f"The source {source!r} cannot read {folder}: {format_error(problem)}.") from problem
