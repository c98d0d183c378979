"""The card of a trained toy model: what was measured, and how to make it again."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable
from typing import Any

import torch

import prisma_core as prisma
from prisma_core.plugin import read_text, write_text
from prisma_toy import checkpoints
from prisma_toy.config import Config
from prisma_toy.measure import Score, held_out
from prisma_toy.task import Task
from prisma_toy.training import Trainer

MODEL, CARD = "model", "card.md"


def command(config: Config, out: str) -> str:
    """Return the command that trains this model again."""
    default, options = Config(), ["prisma train"]
    for name, value in config.model_dump().items():
        if value == getattr(default, name):
            continue
        if name == "norm":
            options.append("--no-norm")
        elif name == "mlp_ratio" and value == 0:
            options.append("--attention-only")
        elif name == "bf16":
            options.append("--bf16")
        else:
            options.append(f"--{name.replace('_', '-')} {value}")
    return " ".join([*options, f"--out {out}"])


HELD_OUT = 4096
_HELD_OUT = "- Held-out "


def finish(trainer: Trainer, n: int = HELD_OUT, progress: Callable[[int], None] | None = None) -> Score:
    """Write the trained model with its card into the run's folder, and return its score on ``n`` held-out images."""
    score = held_out(trainer.model, trainer.task, n, progress=progress)
    folder = prisma.save(trainer.model, trainer.folder / MODEL)
    write_text(folder / checkpoints.CONFIG, trainer.config.model_dump_json(indent=1) + "\n")
    write_text(folder / CARD, text(trainer, score))  # last: it says that the run was finished
    return score


def measured(trainer: Trainer) -> str | None:
    """Return what was measured when a run was finished, or None if it has not been."""
    card = trainer.folder / MODEL / CARD
    if trainer.step < trainer.config.steps or not card.is_file():
        return None
    lines = read_text(card).splitlines()
    line_held_out = next((line for line in lines if line.startswith(_HELD_OUT)), None)
    return line_held_out and line_held_out.removeprefix(_HELD_OUT).partition("), ")[0] + ")"


def _length(trainer: Trainer) -> str:
    if trainer.step == trainer.config.steps:
        return f"{trainer.step} steps"
    return f"checkpoint step-{trainer.step:06d} of that run of {trainer.config.steps} steps"


def text(trainer: Trainer, score: Score) -> str:
    """Return the card."""
    config, task, model = trainer.config, trainer.task, trainer.model
    block = next(iter(model.towers().values())).spec.blocks[0]
    parts = "attention alone" if block.mlp is None else "attention and MLP"
    norms = "with layer norm" if config.norm else "without layer norm"
    layers = "1 layer" if config.layers == 1 else f"{config.layers} layers"
    towers = " in each of two towers" if len(model.towers()) > 1 else ""
    measure, kind = task.objective.measure, "image" if task.tubelet is None else "video"
    lines = [
        f"# {trainer.folder.name}",
        "",
        f"{layers} of {parts}{towers}, {norms}: {task.summary}, {100 * score.accuracy:.2f} % held-out.",
        "",
        f"- Data: `{task.name}`, {_classes(task)}{' x '.join(map(str, task.shape))}, {task.origin}.",
        f"- Model: d_model {config.d_model}, {config.heads} heads, patches of {task.patch} pixels, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters. {_reads(trainer)}",
        f"- Command: `{command(config, trainer.folder.name)}`",
        f"- Seed: {config.seed}; {_length(trainer)} of {config.batch} {kind}s.",
        f"{_HELD_OUT}{measure}: {score}, {task.held_out_is}.",
        *(f"- {line}" for line in (task.report(model, config) if task.report is not None else [])),
        f"- Made {datetime.date.today().isoformat()} with torch {torch.__version__.partition('+')[0]} on a CPU "
        f"({platform.machine()}).",
    ]
    return "\n".join(lines) + "\n"


def _classes(task: Task) -> str:
    return f"{len(task.labels)} classes, " if task.labels else ""


def _reads(trainer: Trainer) -> str:
    """Return which tokens the model's head reads, and how many registers there are."""
    vision: Any = next(iter(trainer.model.towers().values())).spec
    reads = {"avg": "the mean of all tokens", "token": "the class token", "patches": "each patch's own token"}
    registers = trainer.config.registers
    return f"The head reads {reads[vision.pool.kind]}." + (f" {registers} registers." if registers else "")
