"""Folders of models without the code that they name: transformers finds nothing there to import or to ask about.

A configuration of transformers names classes in files beside it, or in another repository (``auto_map``), and kernels
of attention on the hub. ``trust_remote_code=False`` alone does not hold: some of its classes ask the terminal, or pass
on what a configuration says.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prisma_core.files.texts import check_regular, leaves

CODE = "auto_map"
# Where a configuration says who computes attention: the name of a repository of kernels will do.
_KERNELS = {f"{what}_implementation{end}" for what in ("attn", "experts") for end in ("", "_internal")}
_NAMES = {CODE, *_KERNELS, *(f"_{name}" for name in _KERNELS)}


@contextmanager
def without_code(folder: Path) -> Generator[Path]:
    """Yield a folder with the same files, in whose configurations no code and no kernel is named.

    It is the folder itself where none names any; else one of links, removed afterwards. Python files are left out.
    """
    changed = {path: text for path in sorted(folder.glob("*.json")) if (text := _cleaned(path)) is not None}
    if not changed:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        clean = Path(name)
        for path in folder.iterdir():
            if path not in changed and path.suffix != ".py":
                _link(path.resolve(), clean / path.name)
        for path, text in changed.items():
            (clean / path.name).write_text(text, encoding="utf-8")
        yield clean


def code_in(folder: Path) -> str:
    """Return a sentence that names the classes a folder's configurations bring along, or an empty text."""
    texts = (text for path in sorted(folder.glob("*.json")) for text in leaves(_read(path)))
    names = dict.fromkeys(name for keys, name in texts if CODE in keys and isinstance(name, str))
    return f" It names code of its own ({', '.join(list(names)[:3])}), which is not run." if names else ""


def _cleaned(path: Path) -> str | None:
    """Return a configuration without what names code, or None if it names none."""
    keys: list[str] = []

    def clean(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys.extend(name for name, value in pairs if name in _NAMES and value is not None)
        return {name: value for name, value in pairs if name not in _NAMES}

    value = _read(path, clean)
    return json.dumps(value) if keys else None


def _read(path: Path, hook: Any = None) -> object:
    """Return the contents of a JSON file; None where it is broken, for which transformers has an error."""
    check_regular(path)
    try:
        text = path.read_text(encoding="utf-8")
        # Most files, a vocabulary among them, name nothing; an escape may hide a name.
        if not any(name in text for name in _NAMES) and "\\u" not in text:
            return None
        return json.loads(text, object_pairs_hook=hook)
    except (OSError, ValueError, RecursionError):
        return None


def _link(path: Path, place: Path) -> None:
    try:
        place.symlink_to(path, target_is_directory=path.is_dir())
    except OSError:  # a system without links
        shutil.copytree(path, place) if path.is_dir() else shutil.copyfile(path, place)
