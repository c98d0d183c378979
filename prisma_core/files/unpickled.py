"""Files of ``torch.save``, their pickles read by ``pickles.py``: nothing in them is imported or run.

Tensors are plain ones. Other objects beside them become an ``Inert``, those of a class that the caller knows by name a
``SavedObject``. No more memory is asked for than the file is long.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from prisma_core.errors import LoadError
from prisma_core.files.pickles import Refused, call, inert, maker, put, read_pickle
from prisma_core.files.texts import check_regular

MAGIC = 0x1950A86A20F9469CFC6C  # of files before torch 1.6
MAGIC_BYTES = b"\x80\x02\x8a\n" + MAGIC.to_bytes(10, "little") + b"."
MOST = 16  # times a file's own length: bytes may be part of several tensors, a model's and its average's
MOST_AXES = 64  # torch's own limit
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
# What checkpoints of training hold beside tensors: options, paths, scores, states of generators. By module, or by name.
_INERT_MODULES = {"numpy", "argparse", "pathlib", "datetime", "omegaconf", "_codecs", "collections"}
_INERT = {f"{home}.{kind.__name__}" for home in ("builtins", "__builtin__") for kind in (set, slice, list, dict, int)}
_INERT.update(("types.SimpleNamespace", "torch.Tensor"))
_INERT.update(("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"))
_NOT_PLAIN = {
    "sparse": "sparse",
    "qtensor": "quantised",
    "nested": "nested",
    "meta": "without data",
    "wrapper_subclass": "of a class of its own (quantised?)",
}


Known = Callable[[str], bool]


def save_objects(value: object, path: Path) -> None:
    """Write what ``torch.save`` writes.

    Raises:
        OSError: the disk refuses, of which torch itself raises a RuntimeError.
    """
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from error


def read_objects(path: Path, known: Known | None = None, *, start: int = 0, outline: bool = False) -> Any:
    """Read a file of ``torch.save``, tensors on the CPU.

    Args:
        path: the file; where classes are known also a plain pickle, gzipped or not.
        known: whether objects of a class, by its full name, become a ``SavedObject``. Other objects are refused.
        start: the first byte, of a file that begins with something else.
        outline: leave the numbers out: tensors lie on the meta device.

    Raises:
        LoadError: the file wants to run code, claims more than it holds, holds tensors of another kind, is truncated or
            corrupt, or is no file of torch.save.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            return _opened(file, path.stat().st_size, known, start, "meta" if outline else "cpu").read()
    except Refused as error:
        raise LoadError(f"{path} {error}") from error
    except Exception as error:  # over bytes that are no pickle, its reader stumbles in any way there is
        raise LoadError(f"{path} is not a readable checkpoint: is it truncated, or no file of torch.save?") from error


def _opened(file: IO[bytes], size: int, known: Known | None, start: int, device: str) -> _File:
    file.seek(start)
    head = file.read(len(MAGIC_BYTES))
    file.seek(start)
    if head.startswith(b"PK\x03\x04"):
        return _Zip(file, size - start, known, device)
    if known is None or head == MAGIC_BYTES:
        return _Stream(file, size - start, known, device)
    if head.startswith(b"\x1f\x8b"):
        data = gzip.GzipFile(fileobj=file).read(MOST * size + 1)
        if len(data) > MOST * size:
            raise Refused(f"is {size} bytes long and unpacks to more than {MOST} times of that: refused.")
        file, size, start = io.BytesIO(data), len(data), 0
    return _Plain(file, size - start, known, device)


class _File:
    """A file, its storages, and how much it and its tensors claim to hold."""

    def __init__(self, file: IO[bytes], size: int, known: Known | None = None, device: str = "cpu"):
        self.file, self.size, self.known, self.device = file, size, known, device
        self.storages: dict[str | int, Tensor] = {}
        self.held = self.claimed = self.copied = 0

    def read(self) -> Any:
        """Return the object of the pickle at which the file stands."""
        return read_pickle(self.file, self.find, self.stored)

    def storage(self, key: str | int, kind: torch.dtype, numel: int) -> Tensor:
        raise NotImplementedError

    def reserve(self, n: int) -> Tensor:
        """Return memory for ``n`` bytes of the file, aligned as kernels like it."""
        self.held += n
        if n < 0 or self.held > self.size:
            raise Refused(f"is {self.size} bytes long, and its storages claim {self.held}: it is truncated or corrupt.")
        return torch.empty(n, dtype=torch.uint8, device=self.device)

    def stored(self, identity: Any) -> Tensor:
        """Return a storage, as a tensor of its own dtype."""
        what, kind, key, _, numel, *view = identity
        if what != "storage" or not isinstance(key, str | int) or view not in ([], [None]):
            raise Refused("refers to what is no storage of its own: refused, only tensors are read from files.")
        data = self.storage(key, kind, numel)
        if not 0 <= numel * kind.itemsize <= len(data):
            raise Refused("is truncated or corrupt: a storage is shorter than it says.")
        return data[: numel * kind.itemsize].view(kind)

    def tensor(self, storage: Tensor, offset: int, size: Any, stride: Any, *others: Any) -> Tensor:
        if len(others) > 2 and others[2]:
            raise Refused("holds a tensor that is negated or conjugated when it is read: save it with .resolve_neg().")
        if len(size) > MOST_AXES or not all(0 <= n <= MOST * self.size for n in size):
            raise Refused(f"is {self.size} bytes long, and its tensors claim axes of other sizes, or over {MOST_AXES}.")
        self.claimed += math.prod(size) * storage.dtype.itemsize
        if self.claimed > MOST * self.size:
            raise Refused(f"is {self.size} bytes long, and its tensors claim {self.claimed}: refused.")
        return storage.as_strided(tuple(size), tuple(stride), offset)

    def tensor_of(self, storage: Tensor, offset: int, size: Any, stride: Any, *others: Any) -> Tensor:
        kind = others[2]  # a dtype without a class of storages
        return self.tensor(storage.view(kind), offset, size, stride, *others[:2], *others[3:])

    def size_of(self, sizes: Any = ()) -> tuple[Any, ...]:
        return tuple(self.once(sizes))

    def dictionary(self, pairs: Any = ()) -> dict[Any, Any]:
        return put({}, self.once(pairs))

    def once(self, items: Any) -> Any:
        """Return items that are copied; a file that has the same ones copied over and over is refused."""
        self.copied += len(items)
        if self.copied > self.size:
            raise Refused(f"is {self.size} bytes long, and copies {self.copied} items: refused.")
        return items

    def find(self, module: str, name: str) -> Any:
        """Look up a global: a function, a dtype, or a maker of ``SavedObject`` or ``Inert``."""
        path = f"{module}.{name}"
        made: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor_of,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
            "torch._tensor._rebuild_from_type_v2": _of_type,
            "torch.Size": self.size_of,
            "torch.device": _first,
            "collections.OrderedDict": self.dictionary,
            "collections.defaultdict": _empty,
        }
        if path in made:
            return made[path]
        if module in ("torch", "torch.storage"):
            kind = _STORAGES.get(name.removesuffix("Storage"), vars(torch).get(name))
            if isinstance(kind, torch.dtype):
                return kind
        if self.known is not None and self.known(path):
            return maker(path)
        if module.partition(".")[0] in _INERT_MODULES or path in _INERT:
            return inert
        if module == "torch._utils" and (kinds := [kind for part, kind in _NOT_PLAIN.items() if part in name]):
            raise Refused(f"holds a tensor that is {kinds[0]}: only plain ones are read from files.")
        raise Refused(
            f"is a pickle that wants to run {path[:200]}: refused, only tensors are read from files. "
            "Where you trust the file, torch.load(FILE, weights_only=False) reads it: save the state dict in it again, "
            "best as safetensors."
        )


class _Zip(_File):
    """The form that torch writes since 1.6."""

    def read(self) -> Any:
        self.archive = zipfile.ZipFile(self.file)
        names = self.archive.namelist()
        self.root = names[0].partition("/")[0]
        if f"{self.root}/constants.pkl" in names:
            raise Refused(
                "is a TorchScript archive, which holds code: refused. Where you trust it, "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW) writes a file that is read."
            )
        if len(set(names)) < len(names):
            raise Refused("is an archive that holds a file twice: refused.")
        if f"{self.root}/data.pkl" not in names or not all(name.startswith(f"{self.root}/") for name in names):
            raise Refused(f"is an archive that torch.save did not write; it holds {', '.join(names[:3])[:200]}.")
        if f"{self.root}/byteorder" in names:
            _check_order(self.open("byteorder").read(8).decode())
        return read_pickle(self.open("data.pkl"), self.find, self.stored)

    def open(self, name: str) -> IO[bytes]:
        entry = self.archive.getinfo(f"{self.root}/{name}")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Refused("is compressed, as torch.save never writes it: refused.")
        vars_: Any = entry
        vars_.CRC = entry.CRC or None  # torch may have been told to write none
        return self.archive.open(entry)

    def storage(self, key: str | int, kind: torch.dtype, numel: int) -> Tensor:
        if key not in self.storages:
            with self.open(f"data/{key}") as file:
                data = self.reserve(self.archive.getinfo(f"{self.root}/data/{key}").file_size)
                self.storages[key] = _fill(data, file)
        return self.storages[key]


class _Stream(_File):
    """The form before torch 1.6: pickles, then one storage after the other."""

    def read(self) -> Any:
        following = super().read
        if following() != MAGIC:
            raise Refused("is not a file that torch.save wrote, or it is corrupt.")
        following()  # the version of this form; there was one
        _check_order("little" if following()["little_endian"] else "big")
        made = following()
        for key in following():
            self.file.seek(struct.calcsize("<q"), 1)  # its length, which the pickle has too
            _fill(self.storages[key], self.file)
        return made

    def storage(self, key: str | int, kind: torch.dtype, numel: int) -> Tensor:
        if key not in self.storages:
            self.storages[key] = self.reserve(numel * kind.itemsize)
        return self.storages[key]


class _Plain(_File):
    """A pickle that another library wrote, in which each storage is a file of torch's."""

    def find(self, module: str, name: str) -> Any:
        return self.inside if (module, name) == ("torch.storage", "_load_from_bytes") else super().find(module, name)

    def inside(self, data: bytes) -> Any:
        """Return a storage from the bytes of its file."""
        self.reserve(len(data))
        return _Stream(io.BytesIO(data), len(data), device=self.device).read()


def _check_order(order: str) -> None:
    if order != sys.byteorder:
        raise Refused("was written on a machine with another byte order: save it again on this one.")


def _fill(data: Tensor, file: Any) -> Tensor:
    if data.is_meta:
        return data
    rest = memoryview(cast(Any, data.numpy()))
    while rest:
        n = file.readinto(rest[: 1 << 22])
        if not n:
            raise Refused("is truncated: a storage is shorter than it says.")
        rest = rest[n:]
    return data


def _first(data: Any, *_: Any) -> Any:
    return data


def _of_type(make: Any, _: Any, given: Any, state: Any) -> Any:
    return call(make, given)


def _empty(*_: Any) -> dict[Any, Any]:
    return {}
