"""Files and folders that are whole or not there: written beside their place, synced, then moved into it in one step."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar, cast

from safetensors import SafetensorError

from prisma_core.errors import LoadError
from prisma_core.errors.arguments import shown
from prisma_core.files.texts import check_regular

T = TypeVar("T")
_PREFIX = ".prisma-writing-"
_STAGED = _PREFIX + "[a-z0-9_]" * 8  # as tempfile names them: a folder of the user's own is called otherwise
_SHA256 = re.compile("[0-9a-f]{64}")


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


def write_text(path: Path, text: str) -> Path:
    """Write a file of text, and return its path: after a kill it is the old one or the new one.

    Raises:
        LoadError: as ``replacing``.
    """
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return path


@contextmanager
def replacing_both(part: Path, head: Path, sha256: str, *stale: Path) -> Generator[tuple[Path, Path]]:
    """Yield where to write two files that belong together; once the block ends they replace those at their places.

    The text of the head must hold the digest of the part: readers find the part by it (``place``) and compare what
    they read with it, so a kill at any moment leaves the old pair or the new one.

    Args:
        part: such as a file of weights.
        head: a text that says what they are, in the same folder.
        sha256: of the tensors in the part (``digest``).
        stale: files that belong to the old pair alone, and are removed with it.

    Raises:
        LoadError: as ``replacing``.
    """
    folder = head.parent
    with writing(head):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.resolve()), staging(folder) as fresh:
            yield fresh / part.name, fresh / head.name
            waiting = beside(folder, part.name, sha256)
            move(fresh / part.name, waiting)
            move(fresh / head.name, head)
            with suppress(OSError):  # from here on the new pair is there
                for old in stale:
                    old.unlink(missing_ok=True)
                waiting.replace(part)
                for left in folder.glob(_waiting(part.name, "[0-9a-f]" * 12)):
                    left.unlink()


def beside(home: Path, name: str, sha256: str) -> Path:
    """Return where a file or folder of a digest waits until it may be moved to ``home / name``."""
    return home / _waiting(name, sha256[:12])


def _waiting(name: str, mark: str) -> str:
    stem, dot, ending = name.partition(".")
    return f"{stem}-{mark}{dot}{ending}"


def place(home: Path, name: str, sha256: str | None) -> Path:
    """Return where a file or folder of a digest is: beside its place until it is moved there, and then there.

    Raises:
        LoadError: the digest, which a file says, is none.
    """
    if sha256 is not None and not (isinstance(cast(object, sha256), str) and _SHA256.fullmatch(sha256)):
        raise LoadError(f"{home} says no SHA-256 of {name}, but {shown(sha256)}: save it again.")
    waiting = beside(home, name, sha256) if sha256 else home / name
    return waiting if os.path.exists(waiting) else home / name  # unlike Path's, False behind a closed folder


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        LoadError: it is no regular file.
    """
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settled(head: Path, read: Callable[[], T]) -> T:
    """Return what ``read`` returns, which is tried again where another process replaces ``head`` meanwhile.

    Raises:
        LoadError: twice over a head that stays as it is.
    """
    tries = unchanged = 0
    while True:
        before = version(head)
        try:
            return read()
        except (LoadError, FileNotFoundError) as error:  # a file that was there may be gone when it is opened
            tries, unchanged = tries + 1, unchanged + int(version(head) == before)
            if unchanged == 2 or tries == 100:
                raise error if isinstance(error, LoadError) else LoadError(f"No file at {error.filename}.") from error


def version(path: Path) -> tuple[int, ...]:
    """Return what is another once a file was replaced; nothing where there is none."""
    with suppress(OSError, ValueError):
        facts = path.stat()
        return facts.st_ino, facts.st_mtime_ns
    return ()


@contextmanager
def writing(place: Path) -> Generator[None]:
    """Raise what a disk refuses, and safetensors' own error, as one ``LoadError`` that names the place."""
    if "\0" in str(place):
        raise LoadError(f"{str(place)!r} cannot be written: no path holds a NUL.")
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        raise LoadError(f"{place} cannot be written: {reason}. What was there before is as it was.") from error


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Check that a file, or a folder, can be written at a place, else a ``LoadError``. Nothing is left behind."""
    with writing(path):
        if path.exists() and not (path.is_dir() if folder else path.is_file()):
            raise OSError(errno.EEXIST, f"what is there is no {'folder' if folder else 'file'}")
        home = path if folder else path.parent
        while not os.path.lexists(home):
            home = home.parent
        Path(tempfile.mkdtemp(prefix=_PREFIX, dir=home)).rmdir()


@contextmanager
def staging(folder: Path) -> Generator[Path]:
    """Yield a new folder inside ``folder``, on the same disk, and remove it afterwards.

    Those that killed processes left in ``folder`` are removed too: no living process holds them.
    """
    for left in folder.glob(_STAGED):
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
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has the handle too
        os.close(handle)


@contextmanager
def holding(folder: Path) -> Generator[None]:
    """Hold a folder as its only writer.

    Raises:
        LoadError: another process holds it.
    """
    with locked(folder, wait=False) as held:
        if not held and find_spec("fcntl") is not None:
            raise LoadError(
                f"{folder} is being written by another process (or its disk has no locks). Wait for it, or choose "
                "another folder."
            )
        yield


def move(source: Path, target: Path) -> None:
    """Move a file or folder to its place on the same disk, in one step that outlasts a power cut.

    A link in its place is replaced, not followed.
    """
    if source.is_file():
        with suppress(PermissionError):  # a disk without modes
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
    with suppress(OSError if path.is_dir() else PermissionError):  # not every system and disk syncs a folder's names
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
