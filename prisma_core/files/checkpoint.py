"""Tensors in files, read safely: files that are truncated or corrupt, or that run code, raise an error."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from prisma_core.errors import InputError, LoadError
from prisma_core.errors.arguments import path_of
from prisma_core.files.atomic import replacing, version
from prisma_core.files.texts import check_regular
from prisma_core.files.unpickled import read_objects

_WRAPPERS = ("module.", "_forward_module.", "model.")
_INSIDE = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")  # torch's, anywhere
_LORA = re.compile(r"(.*\.)?(lora_\w+|base_layer)\..+|(.*\.)?lora_\w+")
MERGE = (
    "which are added to another model's. Merge them first, with peft: "
    "PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(NEW), and load NEW."
)


def read_checkpoint(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file or of a file that ``torch.save`` wrote.

    Nothing in the file is run. A state dict that lies one level down (``{"model": ..., "epoch": ...}``) is found, and
    names lose what training puts before all of them (``module.``, ``_orig_mod.``, ``model.``).

    Args:
        path: the file.
        key: which state dict to take where several lie one level down, such as ``state_dict_ema``.

    Raises:
        LoadError: there is no such file, it is truncated or corrupt, it wants to run code, or it holds no state dict.
    """
    states = read_states(path)
    if key in states or (key is None and len(states) == 1):
        return states[key] if key is not None else next(iter(states.values()))
    names = ", ".join(name for name in states if name)
    if not names:
        raise LoadError(f"{path} holds one state dict alone, and none named {key!r}: leave key= out.")
    lacks = f", and none named {key!r}" if key is not None else ""
    raise LoadError(f"{path} holds {len(states)} state dicts ({names}){lacks}: give key= one of them.")


def read_states(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts in a file by their names, at least one; the name of one that is the whole file is empty.

    Raises:
        LoadError: as ``read_checkpoint``.
    """
    path = path_of(path)
    check_regular(path)
    if not os.path.isfile(path):  # unlike Path's, False for a name too long
        folder = f"{path} is a folder; expected a file of weights.{_inside(path)}"
        raise LoadError(folder if os.path.isdir(path) else f"No file at {path}.")
    _check_beginning(path)
    states = {"": read_safetensors(path)} if path.suffix == ".safetensors" else _states(read_objects(path), path)
    return {name: _unwrapped(state, path) for name, state in states.items()}


# What stands in the place of weights, by how it begins, and what to do.
_BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS, and not the file: run `git lfs pull` there",
    b"<": "a page of the web, and not the file: download it again",
    b"GGUF": "a file of GGUF, which holds other numbers: take the weights it was made of",
    b"\x89HDF": "a file of HDF5: load it with the library that wrote it, and save model.state_dict()",
    b"\x93NUMPY": "a file of numpy: give tensors by name, as safetensors",
}
_WHOLE = {  # files of a folder, and how to come to one file of weights
    ".metadata": "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {0} weights.pt writes one.",
    "latest": "Of DeepSpeed take {0}/global_step.../mp_rank_00_model_states.pt; of its stage 3 (ZeRO), what "
    "zero_to_fp32.py there writes.",
    "model.safetensors": "Give {0}/model.safetensors.",
    "pytorch_model.bin": "Give {0}/pytorch_model.bin.",
    "model.safetensors.index.json": "The weights are in several files: read each with safetensors.torch.load_file, and "
    "save them in one.",
    "pytorch_model.bin.index.json": "The weights are in several files: read each, and save them in one.",
}


def _inside(folder: Path) -> str:
    return next((f" {how.format(folder)}" for name, how in _WHOLE.items() if (folder / name).is_file()), "")


def _check_beginning(path: Path) -> None:
    """Refuse a file known to hold something else than weights, or weights under another name (``LoadError``)."""
    check_regular(path)
    with path.open("rb") as file:
        head = file.read(32)
    is_safetensors = head[8:10] == b'{"'  # a header of 60 letters begins like a page
    what = next((what for start, what in _BEGINNINGS.items() if head.startswith(start)), None)
    if what is not None and not is_safetensors:
        raise LoadError(f"{path} is {what}.")
    kind = ".safetensors" if is_safetensors else ".pt" if head[:2] == b"PK" else path.suffix
    if kind != path.suffix and ".safetensors" in (kind, path.suffix):
        raise LoadError(f"{path} holds what a {kind} file holds: call it {path.with_suffix(kind).name}.")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; a ``LoadError`` where it is missing, truncated or corrupt."""
    # Copied out of the mapped file: there they start at any byte, and kernels round by how memory is aligned.
    return {name: tensor.clone() for name, tensor in _mapped(path)[0].items()}


def read_with_header(path: Path, name: str) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a file that ``write_safetensors`` wrote, and a text of its header, None where it has none.

    Both are of one file, even where another process replaces it meanwhile. It raises what ``read_safetensors`` does.
    """
    tensors, header = _mapped(path)
    return {key: tensor.clone() for key, tensor in tensors.items()}, header.get(name)


def _mapped(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, mapped into memory (what is used is read), and its header's texts."""
    for _ in range(100):
        before = version(path)
        try:
            check_regular(path)
            with cast(Any, safe_open(path, "pt")) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                header: dict[str, str] = file.metadata() or {}
        except FileNotFoundError as error:
            raise LoadError(f"No file at {path}.") from error
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if version(path) == before:
                unread = f"{path} is not a readable safetensors file (truncated or corrupt?): {error}"
                raise LoadError(unread) from error
        else:  # safetensors opens a file twice, for its header and for its numbers
            if version(path) == before:
                return tensors, header
    raise LoadError(f"{path} is replaced again and again while it is read: read a copy of it.")


def read_outline(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a file as ``read_checkpoint`` does, without their numbers: they lie on the meta device.

    Raises:
        LoadError: as ``read_checkpoint``.
    """
    path = Path(path)
    tensors = _unwrapped(_mapped(path)[0], path) if path.suffix == ".safetensors" else read_checkpoint(path, key)
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> Path:
    """Write tensors to one safetensors file, with texts by name in its header, and return its path.

    Raises:
        InputError: the path does not end in ``.safetensors``.
        LoadError: the disk is full, read-only, or refuses in another way; a file that was there is as it was.
    """
    path = path_of(path)
    if path.suffix != ".safetensors":
        raise InputError(f"Expected a path that ends in .safetensors, got {path}.")
    # A copy of each: several may share storage, which safetensors refuses.
    copies = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    with replacing(path) as beside:
        save_file(copies, beside, metadata=header)
    return path


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of tensors: of their names, dtypes, shapes and bytes, wherever they lie.

    Raises:
        InputError: one is on the meta device.
    """

    def one(name: str) -> bytes:
        if tensors[name].is_meta:
            raise InputError(f"{name} is on the meta device, where tensors hold no numbers: load it on another one.")
        tensor = tensors[name].detach().cpu().contiguous()
        facts = f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode()
        return facts + hashlib.sha256(cast(Any, tensor.flatten().view(torch.uint8).numpy())).digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(one, sorted(tensors)))).hexdigest()


def _states(value: object, path: Path) -> dict[str, dict[str, Tensor]]:
    if _is_state(value):
        return {"": dict(cast("Mapping[str, Tensor]", value))}
    inside: Mapping[Any, object] = cast("Mapping[Any, object]", value) if isinstance(value, Mapping) else {}
    states = {str(key): dict(cast("Mapping[str, Tensor]", part)) for key, part in inside.items() if _is_state(part)}
    if not states:
        raise LoadError(
            f"{path} holds a {type(cast(object, value)).__name__} without a state dict: expected tensors by name."
        )
    if len(states) < sum(map(_is_state, inside.values())):
        raise LoadError(f"{path} holds two state dicts of one name, a number and a text: of {', '.join(states)}.")
    return states


def check_merged(folder: Path) -> None:
    """Refuse a folder that holds LoRA weights, which are not the model's own: libraries read past them without peft.

    Raises:
        LoadError: it holds what peft writes: ``adapter_config.json``, or weights under its names.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if os.path.isfile(folder / name):  # unlike Path's, False for a name too long
            raise LoadError(f"{folder} holds LoRA weights ({name}), {MERGE}")


def _unwrapped(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a state dict without what training puts before its names, such as that of a parallel or averaged model."""
    if lora := next(filter(_LORA.fullmatch, state), None):
        raise LoadError(f"{path} holds LoRA weights ({lora}), {MERGE}")
    names = {name: _INSIDE.sub("", name) for name in state if name != "n_averaged"}
    while wrapper := next((one for one in _WRAPPERS if names and all(x.startswith(one) for x in names.values())), None):
        names = {name: plain.removeprefix(wrapper) for name, plain in names.items()}
    if len(set(names.values())) < len(names) or list(names) == list(names.values()):
        return state
    return {plain: state[name] for name, plain in names.items()}


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


def depth_in(names: Iterable[str], prefix: str, where: object) -> int:
    """Return how many blocks the names of a file's tensors tell of: 12 of ``blocks.0.`` to ``blocks.11.``

    Raises:
        LoadError: a number is left out; a name alone makes no block.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {match[1] for name in names if (match := pattern.match(name))}
    missing = next((index for index in range(len(numbers)) if str(index) not in numbers), None)
    if missing is not None:
        last = max(numbers, key=lambda number: (len(number), number))
        raise LoadError(f"{where} holds tensors of {prefix}{last[:20]}, and none of {prefix}{missing}.")
    return len(numbers)


def check_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor | torch.Size], where: object, then: str = ""
) -> None:
    """Refuse tensors that are missing, extra, misshapen, or no numbers of the expected kind.

    Args:
        tensors: of a file.
        expected: tensors of the model, of any device, or shapes of tensors of real numbers.
        where: the file, for messages.
        then: a sentence on what to do next.

    Raises:
        LoadError: with the names.
    """
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"extra {name}" for name in tensors if name not in expected]
    shapes = {name: one.shape if isinstance(one, Tensor) else one for name, one in expected.items()}
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        then = _behind(tensors, expected) or then
        raise LoadError(f"{where} does not fit the model: {_listed(problems)}.{then and f' {then}'}")
    kinds = {name: _kind(one) if isinstance(one, Tensor) else "real" for name, one in expected.items()}
    came = {name: _kind(tensors[name]) for name in kinds}
    others = [f"{name} is {came[name]}, expected {kind}" for name, kind in kinds.items() if came[name] != kind]
    if others:
        raise LoadError(f"{where} holds numbers of another kind: {_listed(others)}.{then and f' {then}'}")
    check_finite(tensors, where)


def _behind(tensors: Iterable[str], expected: Iterable[str]) -> str:
    """Return what to do where most of the expected names stand behind one prefix, such as a framework puts there."""
    names, wanted = set(tensors), list(expected)
    prefixes = {name.removesuffix(one) for one in wanted[:1] for name in names if name.endswith(f".{one}")}
    prefix = next((each for each in prefixes if 2 * sum(each + one in names for one in wanted) > len(wanted)), None)
    if prefix is None:
        return ""
    state = f"{{n[{len(prefix)}:]: x for n, x in state.items() if n.startswith({prefix!r})}}"
    return f"The model's names stand behind {prefix!r} there: save {state}."


def check_finite(tensors: Mapping[str, Tensor], where: object) -> None:
    """Refuse values that are NaN or infinite.

    Raises:
        LoadError: with the names.
    """
    if broken := [name for name, tensor in tensors.items() if not _is_finite(tensor)]:
        raise LoadError(
            f"{where} holds values that are NaN or infinite, in {_listed(broken, 3)}: a file is damaged, or training "
            "went wrong. Take another checkpoint."
        )


def _is_finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    whole = tensor.float() if tensor.itemsize == 1 else tensor  # torch has no such test of 8 bits
    return bool(torch.isfinite(whole).all())


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "real" if tensor.itemsize > 1 else "real of 8 bits (a code of quantised weights)"
    return "complex" if tensor.is_complex() else "whole"


def _listed(problems: list[str], most: int = 5) -> str:
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return f"{'; '.join(problem[:200] for problem in problems[:most])}{more}"
