"""Data of any kind as items in a fixed order: folders, lists, data sets, tar shards, streams."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from prisma_core import InputError
from prisma_harvest.manifest import tensor_bytes

UNREADABLE = (InputError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
FILMS = frozenset(f".{ending}" for ending in ["avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ogv", "webm", "wmv"])
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "ppm", "video", "mp4", "pixel_values")
_LABELS = ("label", "labels", "cls", "class", "fine_label", "target")
_PATHS = ("__key__", "path", "file_name", "id")
_SAMPLE, _BEGINNING = 16, 8


@dataclass(frozen=True)
class Item:
    """An example before it is decoded.

    Attributes:
        image: anything that is an image or video: a path, encoded bytes, a Pillow image, an array or tensor.
        label: a number or text.
        path: what it is called.
    """

    image: Any
    label: Any = None
    path: str | None = None


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
    columns: tuple[str | None, str | None] = (None, None)

    def items(self) -> Iterator[Item]:
        """Yield the items of a stream from its start."""
        return (item_of(value, self.columns) for value in self.stream or ())


def open_data(
    data: Any, *, limit: int | None = None, image_column: str | None = None, label_column: str | None = None
) -> Data:
    """Return data of any kind as items.

    Args:
        data: a folder of images or of videos (the folders in it are labels), tar shards of WebDataset (a path, a glob,
            ``shards-{000..009}.tar``, or a list), a list of images or of ``(image, label)``, a torch ``Dataset`` or a
            ``datasets.Dataset`` (anything with a length and items), or any iterable of images, ``(image, label)`` or
            mappings.
        limit: take only so many from the start.
        image_column, label_column: the keys of mappings, where they are not the usual ones.

    Raises:
        InputError: it is none of these, or empty.
    """
    columns = (image_column, label_column)
    if isinstance(data, str | Path) and Path(data).is_dir() and not list(Path(data).glob("*.tar")):
        made = _folder(Path(data), limit)
    elif (paths := _tars(data)) is not None:
        made = _tar(paths, columns, limit)
    elif isinstance(data, str | Path | Mapping) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        said = repr(str(data)) if isinstance(data, str | Path) else type(data).__name__
        raise InputError(
            f"Expected a folder of images, tar shards, a list, a data set or an iterable as data, got {said}."
        )
    elif hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        made = _indexed(data, columns, limit)
    else:
        return _stream(data, columns, limit)
    if not made.n:
        raise InputError(f"There are no images in {data if isinstance(data, str | Path) else 'the data'}.")
    return made


# -------------------------------------------------------------------- items


def item_of(value: Any, columns: tuple[str | None, str | None] = (None, None)) -> Item:
    """Return one value of a data set as an item: an image, ``(image, label)``, or a mapping.

    Raises:
        InputError: a mapping holds no image under a known key.
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, tuple):
        image, label = (*value, None)[:2]
        return Item(image, plain(label), str(image) if isinstance(image, str | Path) else None)
    if isinstance(value, Mapping):
        keys = {str(key).lower(): key for key in value}
        image = _key(columns[0], _IMAGES, keys)
        if image is None:
            raise InputError(f"No image among {', '.join(map(str, value))}: name its key with image_column=.")
        label, path = _key(columns[1], _LABELS, keys), _key(None, _PATHS, keys)
        said = None if label is None else plain(_decoded(str(label), value[label]))
        return Item(value[image], said, None if path is None else str(value[path]))
    return Item(value, None, str(value) if isinstance(value, str | Path) else None)


def _key(asked: str | None, usual: Sequence[str], keys: Mapping[str, Any]) -> Any:
    if asked is not None:
        if asked.lower() not in keys:
            raise InputError(f"No column {asked!r}: there are {', '.join(keys)}.")
        return keys[asked.lower()]
    return next((keys[name] for name in usual if name in keys), None)


def _decoded(key: str, value: Any) -> Any:
    """Return a label of a tar shard, which is text in bytes, as a number or text."""
    if not isinstance(value, bytes):
        return value
    text = value.decode("utf-8", "replace").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def plain(label: Any) -> Any:
    """Return a label as JSON has it."""
    if isinstance(label, Tensor | np.ndarray | np.generic):
        return label.tolist()
    return label if isinstance(label, str | int | float | list | None) else str(label)


def opened(image: Any) -> Any:
    """Return encoded bytes as a Pillow image, turned as its camera says; anything else as it is."""
    if isinstance(image, Mapping) and image.get("bytes") is not None:  # datasets' form of an image that is not decoded
        image = image["bytes"]
    if not isinstance(image, bytes):
        return image
    with Image.open(io.BytesIO(image)) as file:
        turned = ImageOps.exif_transpose(file)
        turned.load()
    return turned


def content_hash(image: Any) -> str:
    """Return the SHA-256 of an image as it came: of a file's bytes, else of its pixels with shape and type."""
    if isinstance(image, str | Path):
        with open(image, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(image, Mapping):
        image = image.get("bytes") or b""
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
    if isinstance(image, list):
        return hashlib.sha256("".join(map(content_hash, image)).encode()).hexdigest()
    if not isinstance(image, Tensor):
        array = np.asarray(image)
        return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
    return hashlib.sha256(f"{image.dtype} {list(image.shape)}".encode() + bytes(tensor_bytes(image))).hexdigest()


def _safe_hash(image: Any) -> str:
    try:
        return content_hash(image)
    except UNREADABLE as error:
        return f"unreadable: {type(error).__name__}"


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")).hexdigest()


# -------------------------------------------------------------------- kinds


def _folder(folder: Path, limit: int | None) -> Data:
    endings = set(Image.registered_extensions())
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings | FILMS and path.is_file())
    films = [path for path in files if path.suffix.lower() in FILMS]
    if films and len(films) < len(files):
        raise InputError(f"{folder} holds images and videos: give a folder of one kind, or a list.")
    names = [path.relative_to(folder).as_posix() for path in files][:limit]
    sizes = [path.stat().st_size for path in files[:limit]]

    def get(index: int) -> Item:
        parts = PurePosixPath(names[index]).parts
        return Item(folder / names[index], parts[0] if len(parts) > 1 else None, names[index])

    return Data("folder", _sha([names, sizes]), len(names), get)


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
    paths = [Path(path) for text in texts for one in _braces(text) for path in (sorted(glob.glob(one)) or [one])]
    if lost := [str(path) for path in paths if not path.is_file()]:
        raise InputError(f"No tar shard at {lost[0]}. Shards of another machine: download them, or give an iterable.")
    return paths


def _braces(text: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if match is None:
        return [text]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [each for number in numbers for each in _braces(text[: match.start()] + number + text[match.end() :])]


def _tar(paths: Sequence[Path], columns: tuple[str | None, str | None], limit: int | None) -> Data:
    """Index the shards of WebDataset: members that share a name up to its first dot are one example."""
    index: list[tuple[Path, str, dict[str, tuple[int, int]]]] = []
    for path in paths:
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    place, _, name = member.name.rpartition("/")
                    key, _, ending = name.partition(".")
                    if member.isfile() and key and ending:
                        full = f"{place}/{key}" if place else key
                        groups.setdefault(full, {})[ending.lower()] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            raise InputError(f"{path} is no uncompressed tar file that can be read: {error}") from error
        index += [(path, key, parts) for key, parts in groups.items()]
    index = index[:limit]

    def get(position: int) -> Item:
        path, key, parts = index[position]
        with path.open("rb") as file:
            value: dict[str, Any] = {"__key__": f"{path.name}/{key}"}
            for ending, (offset, size) in parts.items():
                file.seek(offset)
                value[ending] = file.read(size)
        if "json" in value and not any(name in value for name in _LABELS):
            facts = json.loads(value.pop("json"))
            value |= {name: facts[name] for name in _LABELS if isinstance(facts, dict) and name in facts}
        return item_of(value, columns)

    names = [[path.name, key, {ending: size for ending, (_, size) in parts.items()}] for path, key, parts in index]
    return Data("tar", _sha(names), len(index), get)


def _indexed(data: Any, columns: tuple[str | None, str | None], limit: int | None) -> Data:
    n = len(data) if limit is None else min(limit, len(data))

    def get(index: int) -> Item:
        return item_of(data[index], columns)

    spread = {round(i * (n - 1) / (_SAMPLE - 1)) for i in range(_SAMPLE)} if n else ()
    places = range(n) if isinstance(data, list | tuple) else sorted(spread)
    hashes = [_fingerprint(get, index) for index in places]
    if hashes and _fingerprint(get, 0) != hashes[0]:
        raise InputError(
            "The data give another image each time the first one is asked for: a random augmentation cannot be "
            "harvested, for nothing could be resumed or checked. Turn it off."
        )
    return Data("indexed", _sha([n, hashes]), n, get)


def _fingerprint(get: Callable[[int], Item], index: int) -> Any:
    try:
        item = get(index)
    except UNREADABLE as error:
        return f"unreadable: {type(error).__name__}"
    if isinstance(item.image, str | Path):  # a list of a million paths is not read twice
        path = Path(item.image)
        return [str(path), path.stat().st_size if path.is_file() else None, item.label]
    return [_safe_hash(item.image), item.label]


def _stream(data: Iterable[Any], columns: tuple[str | None, str | None], limit: int | None) -> Data:
    iterator = iter(data)
    beginning = list(islice(iterator, _BEGINNING if limit is None else min(limit, _BEGINNING)))
    if not beginning:
        raise InputError("There are no data: the iterable is empty. A generator is used up once: make a new one.")
    hashes = [[_safe_hash(item.image), item.label] for item in (item_of(value, columns) for value in beginning)]
    values = _Values(data, limit) if iterator is not data else _Once(chain(beginning, iterator), limit)
    return Data("stream", _sha(hashes), stream=values, columns=columns, head=item_of(beginning[0], columns))


@dataclass
class _Values:
    """An iterable up to a limit."""

    values: Iterable[Any]
    limit: int | None

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.values), self.limit)


@dataclass
class _Once(_Values):
    """A generator, which is used up by the first who reads it."""

    used: bool = False

    def __iter__(self) -> Iterator[Any]:
        if self.used:
            raise InputError("The generator is used up: make a new one for each pass, or give a list or a data set.")
        self.used = True
        return super().__iter__()
