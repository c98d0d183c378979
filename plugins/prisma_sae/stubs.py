"""Pickled objects as stubs: their attributes are read, and none of their code runs.

A file that pickles whole objects names their classes. Each name that a format is known to use is mapped to a class
without behaviour; any other name is refused. So a module comes out as nested stubs whose ``_parameters``, ``_buffers``
and ``_modules`` hold its tensors.
"""

from __future__ import annotations

import gzip
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prisma_core import LoadError

Known = Callable[[str], bool]


class Stub:
    """An object of a file, without behaviour.

    Attributes:
        path: the full name of its class.
    """

    path = ""

    def __init__(self, *_: object, **__: object):
        pass

    def __setstate__(self, state: object) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                vars(self).update(part)

    def __call__(self, *_: object, **__: object) -> Stub:
        return Stub()

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, part, parameter or buffer by its name or dotted path, or the default."""
        first, _, rest = name.partition(".")
        held = vars(self)
        value = held.get(first)
        for kind in ("_modules", "_parameters", "_buffers"):
            if value is None:
                value = (held.get(kind) or {}).get(first)
        if rest:
            return value.get(rest, default) if isinstance(value, Stub) else default
        return default if value is None else value


def stub_class(path: str) -> type[Stub]:
    """Return a class of stubs that stands for the class of this full name."""
    return type(path.rpartition(".")[2], (Stub,), {"path": path})


def globals_of(path: Path) -> list[str]:
    """Return the names of classes and functions that a file of ``torch.save`` would import, safe ones left out.

    Raises:
        LoadError: it is no such file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # over bytes that are no pickle, torch stumbles in any way there is
        raise LoadError(f"{path} is not a file that torch.save wrote: is it truncated, or another format?") from error


def read_stubs(path: Path, known: Known) -> Any:
    """Return what a file of ``torch.save`` holds, objects of known classes as stubs.

    Raises:
        LoadError: it names a class that is not known, or cannot be read.
    """
    names = globals_of(path)
    _refuse(path, [name for name in names if not known(name)])
    try:
        with torch.serialization.safe_globals([(stub_class(name), name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise LoadError(f"{path} cannot be read without running its code ({str(error).splitlines()[0]}).") from error


def read_plain_pickle(path: Path, known: Known) -> Any:
    """Return what a plain pickle holds, gzipped or not, objects of known classes as stubs.

    Raises:
        LoadError: it names a class that is not known, or cannot be read.
    """
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return _Unpickler(io.BytesIO(data), path, known).load()
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{path} is no readable pickle: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Calls nothing but what makes tensors, containers and stubs."""

    def __init__(self, file: io.BytesIO, path: Path, known: Known):
        super().__init__(file)
        self.path, self.known = path, known

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if not self.known(full):
            _refuse(self.path, [full])
        return stub_class(full)


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


_PLAIN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch.device": torch.device,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,  # type: ignore[attr-defined]
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,  # type: ignore[attr-defined]
}


def _refuse(path: Path, names: list[str]) -> None:
    if names:
        raise LoadError(
            f"{path} is a pickle that wants to import {', '.join(names[:3])}: refused, for no code of a file is run. "
            "Save its state dict again where you trust it."
        )


def tensors_in(stub: Stub, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module's stub by dotted name."""
    for kind in ("_parameters", "_buffers"):
        for name, value in (vars(stub).get(kind) or {}).items():
            if isinstance(value, Tensor):
                yield prefix + name, value.detach()
    for name, part in (vars(stub).get("_modules") or {}).items():
        if isinstance(part, Stub):
            yield from tensors_in(part, f"{prefix}{name}.")
