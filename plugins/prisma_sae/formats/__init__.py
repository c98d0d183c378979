"""Readers of the files that sparse coders are published in, one module a family.

Each module has ``NAME``, ``recognises(path)`` and ``read(path, **options)``. Nothing in a file is run.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from prisma_core import InputError, LoadError, UnknownName
from prisma_core.plugin import checked, keyword_names, suggest
from prisma_sae.coder import SparseCoder

# In the order in which a path is shown to them.
FORMATS = (
    *("sae_lens", "sparsify", "dictionary_learning", "circuit_tracer", "saev"),
    *("vit_prisma", "patch_sae", "overcomplete", "msae"),
)
# What comes of reading fields that are not there, or of another type, and of lists that hold themselves.
_DAMAGED = (LookupError, AttributeError, TypeError, ValueError, RuntimeError, OverflowError)


@checked
def read(path: str | Path, format: str | None = None, **options: Any) -> SparseCoder:  # noqa: A002
    """Read a sparse coder from a file or folder of any known format.

    >>> import tempfile
    >>> from prisma_sae import load, save
    >>> path = save(load("scenes-3l"), tempfile.mkdtemp() + "/coder")
    >>> read(path).facts.hook
    'blocks.1.hook_resid_post'

    Args:
        path: the file, or the folder that holds it.
        format: one of ``FORMATS``; default the one that recognises the path.
        options: of the format's reader, such as ``layer=`` of circuit-tracer's or ``hook=`` where files do not say it.

    Raises:
        UnknownName: no such format.
        InputError: the reader has no such option.
        LoadError: no format recognises the path, the file wants to run code, it cannot be read, or holds numbers that
            are NaN or infinite.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise LoadError(f"No file or folder at {path}.")
    module = _recognised(path) if format is None else _named(format)
    accepted = keyword_names(module.read)[1:]
    if unknown := [name for name in options if name not in accepted]:
        raise InputError(f"The reader of {module.NAME} has no option {unknown[0]!r}; it takes {', '.join(accepted)}.")
    try:
        return module.read(path, **options)
    except _DAMAGED as error:
        raise LoadError(
            f"{path} is no whole file of {module.NAME}'s: something in it is missing, or of another type "
            f"({type(error).__name__}: {str(error)[:200]})."
        ) from error


def _named(name: str) -> ModuleType:
    if name not in FORMATS:
        raise UnknownName(f"No format {name!r}.{suggest(name, FORMATS)} There are {', '.join(FORMATS)}.")
    return importlib.import_module(f"prisma_sae.formats.{name}")


def _recognised(path: Path) -> ModuleType:
    for name in FORMATS:
        module = _named(name)
        if module.recognises(path):
            return module
    held = f", which holds {', '.join(sorted(each.name for each in path.iterdir())[:6])}" if path.is_dir() else ""
    raise LoadError(
        f"{path}{held}, is no sparse coder in a known format ({', '.join(FORMATS)}): name it with format=, or see "
        "docs/how-to-sparse.md for what each consists of."
    )
