"""Files and folders that are whole or not there: written beside their place, synced, then moved into it in one step."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from prisma_core.errors import LoadError

_PREFIX = ".prisma-"


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield where to write what becomes the file or new folder at ``path`` once the block ends without an error.

    Whatever happens on the way, a kill included, a file that was there stays as it was. Parents are made.

    Raises:
        LoadError: the disk is full, read-only, or refuses in another way.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging(path.parent) as beside:
            yield beside / path.name
            move(beside / path.name, path)


@contextmanager
def writing(place: Path) -> Generator[None]:
    """Raise what a disk refuses as one error that names the place.

    Raises:
        LoadError: in the place of an OSError and of safetensors' own error.
    """
    if "\0" in str(place):
        raise LoadError(f"{str(place)!r} cannot be written: no path holds a NUL.")
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        raise LoadError(f"{place} cannot be written: {reason}. What was there before is as it was.") from error


@contextmanager
def staging(folder: Path) -> Generator[Path]:
    """Yield a new folder inside ``folder``, on the same disk, and remove it afterwards.

    Those that killed processes left in ``folder`` are removed too: no living process holds them.
    """
    for left in folder.glob(f"{_PREFIX}*"):
        with locked(left, wait=False) as mine:
            if mine and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
    while True:
        beside = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        with locked(beside):
            if not beside.exists():  # another process took it for an abandoned one before it was locked
                continue
            try:
                yield beside
            finally:
                shutil.rmtree(beside, ignore_errors=True)
            return


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Generator[bool]:
    """Hold a folder against other processes and threads that lock it too; the system releases it after a kill.

    Yields whether it is held: not every system and disk has such locks.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (ImportError, AttributeError, OSError):
        yield False
        return
    try:
        held = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


def move(source: Path, target: Path) -> None:
    """Move a file or folder to its place on the same disk, in one step that outlasts a power cut.

    A link in its place is replaced, not followed.
    """
    if source.is_file():
        source.chmod(0o666 & ~_umask(source.parent))  # safetensors writes files for their owner alone
    for path in (source, *source.rglob("*")):
        _sync(path)
    os.replace(source, target)
    _sync(target.parent)


def _umask(folder: Path) -> int:
    probe = folder / "mode"
    probe.touch()
    return 0o666 & ~probe.stat().st_mode


def _sync(path: Path) -> None:
    with suppress(PermissionError, IsADirectoryError):  # some systems do not open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
