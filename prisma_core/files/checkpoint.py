"""Tensors from files, safely: what is truncated, corrupt or wants to run code is refused in words."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from prisma_core.errors import LoadError


def read_checkpoint(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file or of a file that ``torch.save`` wrote.

    Nothing in the file is run. A state dict that lies one level down (``{"model": ..., "epoch": ...}``) is found.

    Args:
        path: the file.
        key: which state dict to take where several lie one level down.

    Raises:
        LoadError: there is no such file, it is truncated or corrupt, it wants to run code, or it holds no state dict.
    """
    found = read_states(path)
    if len(found) == 1 or key in found:
        return found.get(key or "", next(iter(found.values())))
    lacks = f", and none named {key!r}" if key else ""
    raise LoadError(f"{path} holds {len(found)} state dicts ({', '.join(found)}){lacks}: keep one of them in the file.")


def read_states(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts in a file by their names, at least one; the name of one that is the whole file is empty.

    Raises:
        LoadError: as ``read_checkpoint``.
    """
    path = Path(path)
    if not path.is_file():
        raise LoadError(f"{path} is a folder; expected a file of weights." if path.is_dir() else f"No file at {path}.")
    if path.suffix == ".safetensors":
        return {"": read_safetensors(path)}
    return _states(_unpickled(path), path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        LoadError: the file is missing, truncated or corrupt.
    """
    try:
        # Copied out of the mapped file: there they start at any byte, and kernels round by how memory is aligned.
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise LoadError(f"No file at {path}.") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LoadError(f"{path} is not a readable safetensors file (truncated or corrupt?): {error}") from error


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of tensors: of their names, dtypes, shapes and bytes, wherever they lie."""

    def one(name: str) -> bytes:
        tensor = tensors[name].detach().cpu().contiguous()
        facts = f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode()
        return facts + hashlib.sha256(cast(Any, tensor.flatten().view(torch.uint8).numpy())).digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(one, sorted(tensors)))).hexdigest()


class _Inert:
    """Stands where a file holds a number or an array of numpy's: kept as nothing, so no code of numpy's runs on it."""

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


_NUMPY = [
    *(f"numpy.{core}.multiarray.{made}" for core in ("core", "_core") for made in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
]


def _unpickled(path: Path) -> object:
    try:
        # Training leaves a best score of numpy's, or the state of its generator, beside the tensors.
        with torch.serialization.safe_globals([(_Inert, name) for name in _NUMPY]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol: what matters is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"(?:GLOBAL|global:?)\s+`?([\w.]+\.\w+)", str(error)):
            raise LoadError(
                f"{path} is a pickle that wants to run {wanted[1]}: refused, only tensors are read from files. "
                "Save model.state_dict() again where you trust the file, best as safetensors."
            ) from error
        raise LoadError(f"{path} is not a file that torch.save wrote, or it is corrupt.") from error
    except Exception as error:  # over bytes that are no pickle, torch stumbles in any way there is
        raise LoadError(f"{path} is not a readable checkpoint: is it truncated, or no file of torch.save?") from error


def _states(value: object, path: Path) -> dict[str, dict[str, Tensor]]:
    if _is_state(value):
        return {"": dict(cast("Mapping[str, Tensor]", value))}
    inside: Mapping[Any, object] = cast("Mapping[Any, object]", value) if isinstance(value, Mapping) else {}
    found = {str(key): dict(cast("Mapping[str, Tensor]", part)) for key, part in inside.items() if _is_state(part)}
    if not found:
        raise LoadError(
            f"{path} holds a {type(cast(object, value)).__name__} without a state dict: expected tensors by name."
        )
    return found


def _is_state(value: object) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    items = cast("Mapping[object, object]", value).items()
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items)


def check_axes(tensors: Mapping[str, Tensor], axes: Mapping[str, int], where: object, then: str = "") -> None:
    """Refuse tensors with another number of axes, of those that are there: what is read off shapes relies on it.

    Raises:
        LoadError: with the name.
    """
    for name, count in axes.items():
        if name in tensors and tensors[name].ndim != count:
            shape = list(tensors[name].shape)
            raise LoadError(f"{where}: {name} has shape {shape}, expected {count} axes.{then and f' {then}'}")


def check_shapes(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], where: object, then: str = ""
) -> None:
    """Refuse tensors that are missing, extra or misshapen.

    Args:
        where: the file, for messages.
        then: a sentence on what to do next.

    Raises:
        LoadError: with the names.
    """
    problems = [f"missing {name}" for name in shapes if name not in tensors]
    problems += [f"extra {name}" for name in tensors if name not in shapes]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise LoadError(f"{where} does not fit the model: {'; '.join(problems[:5])}{more}.{then and f' {then}'}")
