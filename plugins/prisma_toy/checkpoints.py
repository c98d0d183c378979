"""Files that are whole or not there: written beside their place, then moved into it in one step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, LoadError

CONFIG, STATE, LOG, CHECKPOINTS = "config.json", "state.safetensors", "log.jsonl", "checkpoints"
_TEMPORARY = ".partial-"


def write(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, never a part."""
    beside = path.with_name(_TEMPORARY + path.name)
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a folder so that it is there with all its files, or not at all."""
    beside = path.with_name(_TEMPORARY + path.name)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    fill(beside)
    if path.exists():
        shutil.rmtree(path)
    os.replace(beside, path)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for left in [*folder.glob(f"{_TEMPORARY}*"), *(folder / CHECKPOINTS).glob(f"{_TEMPORARY}*")]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write all a run needs to go on, weights, optimizer and step, in one file, so that they belong together."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write(folder / STATE, save(whole, metadata={"facts": json.dumps(facts)}))


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what ``save_state`` wrote.

    Raises:
        LoadError: the file is corrupt.
    """
    try:
        with safe_open(folder / STATE, "pt") as file:
            # Copied out of the file: kernels may round by how memory is aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["facts"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{folder / STATE} is not a state that prisma train wrote: {error}") from error


def save_model(folder: Path, model: HookedViT, step: int) -> Path:
    """Write a checkpoint that ``prisma.load("file:...")`` reads."""
    path = folder / CHECKPOINTS / f"step-{step:06d}"
    write_folder(path, lambda beside: prisma.save(model, beside))
    return path


def log_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run's log; a last line cut short by a kill is left out."""
    path = folder / LOG
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def rewind_log(folder: Path, step: int) -> None:
    """Drop the rows after ``step``: the run will write them again."""
    rows = [json.dumps(row) for row in log_rows(folder) if row["step"] <= step]
    write(folder / LOG, "".join(row + "\n" for row in rows).encode())


def due(step: int, steps: int) -> bool:
    """Say whether a checkpoint is kept after this many steps: dense early, then at ever longer distances.

    0, 1, 2, 4, ... up to 64, then about eight a doubling, and the last.
    """
    if step in (0, steps) or (step <= 64 and step & (step - 1) == 0):
        return True
    if step <= 64:
        return False
    stride = 1 << (step.bit_length() - 4)
    return step % stride == 0


def recent(folder: Path, rows: int = 5) -> tuple[float | None, float | None]:
    """Return the mean loss and accuracy of the last rows of a run's log, or None twice where there are none."""
    log = folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines()[-rows:] if log.is_file() else []
    found = [json.loads(line) for line in lines]
    if not found:
        return None, None
    return sum(row["loss"] for row in found) / len(found), sum(row["accuracy"] for row in found) / len(found)
