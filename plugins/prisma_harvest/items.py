"""Examples before they are decoded: an image of any form, with its label and what it is called."""

from __future__ import annotations

import hashlib
import io
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from prisma_core import InputError
from prisma_core.plugin import file_digest, open_image, read_video, shown
from prisma_harvest.manifest import tensor_bytes

UNREADABLE = (InputError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "ppm", "video", "mp4", "pixel_values")
LABELS = ("label", "labels", "cls", "class", "fine_label", "target")
_PATHS = ("__key__", "path", "file_name", "id")


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
        label, path = _key(columns[1], LABELS, keys), _key(None, _PATHS, keys)
        label_text = None if label is None else plain(_decoded(str(label), value[label]))
        return Item(_undecoded(value[image]), label_text, None if path is None else _encodable(str(value[path])))
    return Item(value, None, str(value) if isinstance(value, str | Path) else None)


def _key(asked: str | None, usual: Sequence[str], keys: Mapping[str, Any]) -> Any:
    if asked is not None:
        if asked.lower() not in keys:
            raise InputError(f"No column {asked!r}: there are {', '.join(keys)}.")
        return keys[asked.lower()]
    return next((keys[name] for name in usual if name in keys), None)


def _undecoded(image: Any) -> Any:
    """Return datasets' form of an image that is not decoded as its bytes, or its path; anything else as it is."""
    if not isinstance(image, Mapping) or not image.keys() <= {"bytes", "path"}:
        return image
    content, path = image.get("bytes"), image.get("path")
    return content if content is not None or path is None else Path(path)


def _encodable(text: str) -> str:
    """Return text as a file of JSON holds it: half a character, which no file holds, as a question mark."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _decoded(key: str, value: Any) -> Any:
    """Return a label of a tar shard, which is text in bytes, as a number or text."""
    if not isinstance(value, bytes):
        return value
    text = value.decode("utf-8", "replace").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def plain(label: Any) -> Any:
    """Return a label as JSON has it; NaN, with which tables mark that there is none, as None."""
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.tolist()
    if isinstance(label, bytes):
        label = label.decode("utf-8", "replace")
    if isinstance(label, list | tuple):
        return [plain(each) for each in label]
    if isinstance(label, float) and not math.isfinite(label):
        return None if math.isnan(label) else str(label)
    return label if isinstance(label, int | float | None) else _encodable(str(label))


def opened(image: Any) -> Any:
    """Return encoded bytes as a Pillow image, or as the frames of a video; anything else as it is.

    Raises:
        InputError: the bytes are neither.
    """
    if not isinstance(image, bytes):
        return image
    try:
        with Image.open(io.BytesIO(image)) as file:
            return open_image(file)
    except UnidentifiedImageError:
        return _frames(image)
    except Exception as error:  # over damaged bytes decoders stumble in any way there is
        raise InputError(f"The bytes are not an image that Pillow can read: {error}") from error


def _frames(film: bytes) -> Tensor:
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(film)
        file.flush()
        try:
            return read_video(file.name)
        except InputError as error:
            raise InputError(f"The {len(film)} bytes are neither an image nor a video.") from error


def content_hash(image: Any) -> str:
    """Return the SHA-256 of an image as it came: of a file's bytes, else of its pixels with shape and type."""
    if isinstance(image, str | Path):
        return file_digest(Path(image))
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if isinstance(image, Image.Image):
        return hashlib.sha256(f"{image.mode} {image.size}{_beside(image)}".encode() + image.tobytes()).hexdigest()
    if isinstance(image, list):
        return hashlib.sha256("".join(map(content_hash, image)).encode()).hexdigest()
    if isinstance(image, Tensor) and image.is_meta:
        raise InputError(f"Expected pixels, got {shown(image)} on meta, without data.")
    if not isinstance(image, Tensor):
        array = np.asarray(image)
        return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
    total = hashlib.sha256(f"{image.dtype} {list(image.shape)}".encode())
    total.update(tensor_bytes(image))
    return total.hexdigest()


def _beside(image: Image.Image) -> str:
    """Return what a Pillow image looks like by, besides its pixels: its palette, transparency and orientation."""
    palette = image.getpalette(None)  # in its own mode; decodes the image, which brings the rest
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, TypeError):  # damaged, which opening it tells
        turned = "unreadable"
    facts = [palette, image.info.get("transparency"), turned]
    return "" if facts == [None, None, 1] else f" {facts}"


def safe_hash(image: Any) -> str:
    try:
        return content_hash(image)
    except UNREADABLE as error:
        return f"unreadable: {type(error).__name__}"
