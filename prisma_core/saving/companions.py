"""What goes with a model and is made by another library: a tokenizer, a processor. A saved model keeps it as files."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prisma_core.errors import InputError, LoadError


class Kept:
    """A companion that lies beside saved weights, as files; made of them at first use, and used as it was before.

    Attributes:
        what: the model's attribute that holds it.
        source: the name of the source that wrote the files and reads them.
        folder: where they are.
    """

    def __init__(self, what: str, source: str, folder: Path, make: Callable[[str, Path], Any]):
        self.what = what
        self.source = source
        self.folder = folder
        self._make = make
        self._seen = _digest(folder)
        self._made: Any = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.made()(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy that is not filled yet has none, and asks for them
            raise AttributeError(name)
        return getattr(self.made(), name)

    def __repr__(self) -> str:
        return f"<the {self.what} in {self.folder}, of {self.source}>"

    def made(self) -> Any:
        """Return the companion itself.

        Raises:
            PluginError: the library that it belongs to is not installed.
            LoadError: its files are not those that were there when the model was loaded.
        """
        if self._made is None:
            self._check()
            self._made = self._make(self.source, self.folder)
        return self._made

    def copy(self, folder: Path) -> None:
        """Write its files into another folder, which is there."""
        self._check()
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    def _check(self) -> None:
        if _digest(self.folder) != self._seen or not self.folder.is_dir():
            raise LoadError(
                f"The {self.what} in {self.folder} is not there, or changed since the model was loaded. Load the model "
                f"again, or set model.{self.what}."
            )


class Lost:
    """Stands for a companion that could not be saved: whoever calls it is told why."""

    def __init__(self, what: str, why: str):
        self.what = what
        self.why = why

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        raise InputError(f"The {self.what} was not saved with this model: {self.why}. Set model.{self.what} again.")

    def __repr__(self) -> str:
        return f"<a {self.what} that was not saved: {self.why}>"


def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode())
    return total.hexdigest()
