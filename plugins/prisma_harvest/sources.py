"""Data of any kind as items in a fixed order: folders, lists, data sets, tar shards, streams."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from prisma_core import InputError, Result
from prisma_core.plugin import Count, blaming, checked, path_of, shown
from prisma_harvest.items import LABELS, UNREADABLE, Item, item_of, safe_hash

FILMS = frozenset(f".{ending}" for ending in ["avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ogv", "webm", "wmv"])
_SAMPLE, _BEGINNING = 16, 8
Columns: TypeAlias = tuple[str | None, str | None]  # the keys of image and label in mappings, where they are not usual
Member: TypeAlias = tuple[Path, str, dict[str, tuple[int, int]]]  # the shard, the key, offset and size by ending


@dataclass(frozen=True)
class Data:
    """Items in a fixed order.

    Attributes:
        kind: as in the manifest.
        fingerprint: as in the manifest.
        n: how many; None for a stream.
        get: the item at a position; None for a stream.
        stream: the values of a stream.
        head: its first item.
        columns: the keys of image and label in mappings.
    """

    kind: Literal["folder", "tar", "indexed", "stream"]
    fingerprint: str
    n: int | None = None
    get: Callable[[int], Item] | None = None
    stream: Iterable[Any] | None = None
    head: Item | None = None
    columns: Columns = (None, None)

    def items(self) -> Iterator[Item]:
        """Yield the items of a stream from its start."""
        return (item_of(value, self.columns) for value in self.stream or ())


@checked
def open_data(
    data: Any, *, limit: Count | None = None, image_column: str | None = None, label_column: str | None = None
) -> Data:
    """Return data of any kind as items.

    >>> import torch
    >>> open_data([(torch.rand(3, 96, 96), "noise")]).n
    1

    Args:
        data: a folder of images or of videos (the folders in it are labels; links are followed), tar shards of
            WebDataset (a path, a glob, ``shards-{000..009}.tar``, or a list), a list of images or of
            ``(image, label)``, a torch ``Dataset`` or a ``datasets.Dataset`` (anything with a length and items), or
            any iterable of images, ``(image, label)`` or mappings.
        limit: take only so many from the start.
        image_column, label_column: the keys of mappings, where they are not the usual ones.

    Raises:
        InputError: it is none of these, or empty.
    """
    columns = (image_column, label_column)
    if isinstance(data, str | Path):
        path_of(data, "a folder of images or tar shards as data")
    if isinstance(data, str | Path) and Path(data).is_dir() and (files := _files(Path(data))):
        if given := [column for column in columns if column is not None]:
            raise InputError(f"{data} is a folder, whose images have no columns: leave out {given[0]!r}.")
        items = _folder(Path(data), files, limit)
    elif (paths := _tars(data)) is not None:
        items = _tar(paths, columns, limit)
    elif isinstance(data, DataLoader):
        raise InputError("Expected images one by one, and a DataLoader gives batches: give loader.dataset.")
    elif (
        isinstance(data, str | Path | Mapping | Result)
        or getattr(data, "ndim", 1) == 0
        or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))
    ):
        raise InputError(
            f"Expected a folder of images, tar shards, a list, a data set or an iterable as data, got {shown(data)}."
        )
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, IterableDataset):
        items = _indexed(data, columns, limit)
    else:
        return _stream(data, columns, limit)
    if not items.n:
        raise InputError(f"There are no images in {data if isinstance(data, str | Path) else 'the data'}.")
    return items


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")).hexdigest()


# -------------------------------------------------------------------- kinds


def _files(folder: Path) -> list[Path]:
    """Return the images, or the videos, below a folder and the folders that it links to.

    Raises:
        InputError: it holds several kinds of data, or a folder in it cannot be read.
    """
    Image.init()
    endings, found = FILMS | set(Image.registered_extensions()), list[Path]()
    for place, folders, names in os.walk(folder, onerror=_unread, followlinks=True):
        if os.path.islink(place) and Path(place).resolve() in (each.resolve() for each in Path(place).parents):
            folders.clear()  # a link to a folder that it is in
            continue
        paths = (Path(place, name) for name in names if os.path.splitext(name)[1].lower() in endings)
        found += [path for path in paths if path.is_file() or path.is_symlink()]
    films = sum(path.suffix.lower() in FILMS for path in found)
    tars = any(folder.glob("*.tar"))
    if 0 < films < len(found) or (found and tars):
        kinds = [("images", films < len(found)), ("videos", films), ("tar files", tars)]
        there = " and ".join(kind for kind, n in kinds if n)
        raise InputError(f"{folder} holds {there}: give a folder of one kind, or a list.")
    return sorted(found)


def _unread(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read: {error.strerror}.")


def _folder(folder: Path, files: Sequence[Path], limit: int | None) -> Data:
    names = [path.relative_to(folder).as_posix() for path in files][:limit]
    sizes = [path.stat().st_size if path.exists() else None for path in files[:limit]]  # a link may lead nowhere
    return Data("folder", _sha([names, sizes]), len(names), _Files(folder.absolute(), names))


@dataclass(frozen=True)
class _Files:
    """Images by number: like all that follow, a class, for processes that do not begin as copies of this one."""

    folder: Path
    names: Sequence[str]

    def __call__(self, index: int) -> Item:
        name = self.names[index]
        parts = PurePosixPath(name).parts
        return Item(self.folder / name, parts[0] if len(parts) > 1 else None, name)


def _tars(data: Any) -> list[Path] | None:
    """Return the tar files that data mean, or None."""
    if isinstance(data, str | Path):
        if Path(data).is_dir():
            return sorted(Path(data).glob("*.tar"))
        texts = [str(data)]
    elif isinstance(data, list) and data and all(isinstance(one, str | Path) for one in data):
        texts = [str(one) for one in data]
    else:
        return None
    if not all(text.endswith(".tar") for text in texts):
        return None
    paths: list[Path] = []
    for one in chain.from_iterable(map(_braces, texts)):
        paths += map(Path, sorted(glob.glob(one)) or [one])
        if not paths[-1].is_file():
            raise InputError(
                f"No tar shard at {paths[-1]}. Shards of another machine: download them, or give an iterable."
            )
    return paths


def _braces(text: str) -> Iterator[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if match is None:
        yield text
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _braces(text[: match.start()] + str(number).zfill(len(first)) + text[match.end() :])


def _tar(paths: Sequence[Path], columns: Columns, limit: int | None) -> Data:
    """Index the shards of WebDataset: members that share a name up to its first dot are one example."""
    index: list[Member] = []
    for path in paths:
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    place, _, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")
                    if not (key and ending) or member.isdir():
                        continue
                    parts = groups.setdefault(f"{place}/{key}" if place else key, {})
                    if not member.isreg() or member.issparse() or ending.lower() in parts:
                        kind = "twice" if member.isreg() and not member.issparse() else "as a link, or with gaps"
                        raise InputError(
                            f"{path} holds {member.name!r} {kind}: pack each file once, as it is (of GNU tar "
                            "--hard-dereference -h, and no --sparse)."
                        )
                    parts[ending.lower()] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"{path} is no uncompressed tar file that can be read: {error}") from error
        index += [(path.absolute(), key, parts) for key, parts in groups.items()]
    index = index[:limit]
    names = [[path.name, key, {ending: size for ending, (_, size) in parts.items()}] for path, key, parts in index]
    return Data("tar", _sha(names), len(index), _Members(index, columns))


@dataclass(frozen=True)
class _Members:
    index: Sequence[Member]
    columns: Columns

    def __call__(self, position: int) -> Item:
        path, key, parts = self.index[position]
        with path.open("rb") as file:
            value: dict[str, Any] = {"__key__": f"{path.name}/{key}"}
            for ending, (offset, size) in parts.items():
                file.seek(offset)
                value[ending] = file.read(size)
        if "json" in value and not any(name in value for name in LABELS):
            facts = _json(value.pop("json"))
            value |= {name: facts[name] for name in LABELS if isinstance(facts, dict) and name in facts}
        return item_of(value, self.columns)


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error


def _indexed(data: Any, columns: Columns, limit: int | None) -> Data:
    n = len(data) if limit is None else min(limit, len(data))
    get = _Values(data, columns)
    spread = {round(i * (n - 1) / (_SAMPLE - 1)) for i in range(_SAMPLE)} if n else ()
    places = range(n) if isinstance(data, list | tuple) else sorted(spread)
    hashes = [_fingerprint(get, index) for index in places]
    if hashes and _fingerprint(get, 0) != hashes[0]:
        raise InputError(
            "The data give another image each time the first one is asked for: a random augmentation cannot be "
            "harvested, for nothing could be resumed or checked. Turn it off."
        )
    return Data("indexed", _sha([n, hashes]), n, get)


@dataclass(frozen=True)
class _Values:
    data: Any
    columns: Columns

    def __call__(self, index: int) -> Item:
        with blaming(self.data, error=InputError):
            value = self.data[index]
        return item_of(value, self.columns)


def _fingerprint(get: Callable[[int], Item], index: int) -> Any:
    try:
        item = get(index)
    except UNREADABLE as error:
        return f"unreadable: {type(error).__name__}"
    if isinstance(item.image, str | Path):  # a list of a million paths is not read twice
        path = Path(item.image)
        return [str(path), path.stat().st_size if path.is_file() else None, item.label]
    return [safe_hash(item.image), item.label]


def _stream(data: Iterable[Any], columns: Columns, limit: int | None) -> Data:
    iterator = iter(data)
    beginning = list(islice(iterator, _BEGINNING if limit is None else min(limit, _BEGINNING)))
    if not beginning:
        raise InputError("There are no data: the iterable is empty. A generator is used up once: make a new one.")
    hashes = [[safe_hash(item.image), item.label] for item in (item_of(value, columns) for value in beginning)]
    values = _Begun(data, limit) if iterator is not data else _Once(chain(beginning, iterator), limit)
    return Data("stream", _sha(hashes), stream=values, columns=columns, head=item_of(beginning[0], columns))


@dataclass
class _Begun:
    """An iterable up to a limit."""

    values: Iterable[Any]
    limit: int | None

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.values), self.limit)


@dataclass
class _Once(_Begun):
    """A generator, which is used up by the first who reads it."""

    used: bool = False

    def __iter__(self) -> Iterator[Any]:
        if self.used:
            raise InputError("The generator is used up: make a new one for each pass, or give a list or a data set.")
        self.used = True
        return super().__iter__()
