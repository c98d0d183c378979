"""The files of a training run: configuration, state, log and checkpoints, each whole or not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import prisma_core as prisma
from prisma_core import LoadError, ZooModel
from prisma_core.plugin import check_regular, replacing, write_text

CONFIG, STATE, LOG, CHECKPOINTS = "config.json", "state.safetensors", "log.jsonl", "checkpoints"


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write all a run needs to go on, weights, optimizer and step, in one file, so that they belong together."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(folder / STATE) as beside:
        save_file(whole, beside, metadata={"facts": json.dumps(facts)})


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what ``save_state`` wrote.

    Raises:
        LoadError: the file is corrupt.
    """
    check_regular(folder / STATE)
    try:
        with safe_open(folder / STATE, "pt") as file:
            # Copied out of the file: kernels may round by how memory is aligned.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["facts"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"{folder / STATE} is not a state that prisma train wrote: {error}") from error


def save_model(folder: Path, model: ZooModel, step: int) -> Path:
    """Write a checkpoint that ``prisma.load("file:...")`` reads."""
    path = folder / CHECKPOINTS / f"step-{step:06d}"
    if path.exists():  # by a run that was killed after it
        return prisma.save(model, path)
    with replacing(path) as beside:
        prisma.save(model, beside)
    return path


def log_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run's log, up to a line that was cut short by a kill or is none of a log."""
    path = folder / LOG
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            yield {**row, "step": int(row["step"]), "loss": float(row["loss"]), "score": float(row["score"])}
        except (ValueError, KeyError, TypeError, RecursionError):
            return


def rewind_log(folder: Path, step: int) -> None:
    """Drop the rows after ``step``: the run will write them again."""
    rows = [json.dumps(row) for row in log_rows(folder) if row["step"] <= step]
    write_text(folder / LOG, "".join(row + "\n" for row in rows))


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
    """Return the mean loss and score of the last rows of a run's log, or None twice where there are none."""
    found = list(log_rows(folder))[-rows:]
    if not found:
        return None, None
    return sum(row["loss"] for row in found) / len(found), sum(row["score"] for row in found) / len(found)
