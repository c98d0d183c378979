"""The card of a trained toy model: what was measured, and how to make it again."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable

import torch

import prisma_core as prisma
from prisma_toy import checkpoints
from prisma_toy.measure import Score, held_out, two_shape_lens
from prisma_toy.training import Config, Trainer

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
_ACCURACY = "- Held-out accuracy: "


def finish(trainer: Trainer, n: int = HELD_OUT, progress: Callable[[int], None] | None = None) -> Score:
    """Write the trained model with its card into the run's folder, and return its score on ``n`` held-out pictures."""
    score = held_out(trainer.model, trainer.task, n, progress=progress)
    folder = prisma.save(trainer.model, trainer.folder / MODEL)
    checkpoints.write(folder / checkpoints.CONFIG, trainer.config.model_dump_json(indent=1) + "\n")
    checkpoints.write(folder / CARD, text(trainer, score))  # last: it says that the run was finished
    return score


def measured(trainer: Trainer) -> str | None:
    """Return what was measured when a run was finished, or None if it has not been."""
    card = trainer.folder / MODEL / CARD
    if trainer.step < trainer.config.steps or not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8").splitlines()
    found = next((line for line in lines if line.startswith(_ACCURACY)), None)
    return found and found.removeprefix(_ACCURACY).partition(", on pictures")[0]


def _length(trainer: Trainer) -> str:
    if trainer.step == trainer.config.steps:
        return f"{trainer.step} steps"
    return f"checkpoint step-{trainer.step:06d} of that run of {trainer.config.steps} steps"


def text(trainer: Trainer, score: Score) -> str:
    """Return the card."""
    config, spec, task = trainer.config, trainer.model.spec, trainer.task
    size = sum(p.numel() for p in trainer.model.parameters())
    parts = "attention alone" if spec.blocks[0].mlp is None else "attention and MLP"
    read = "the mean of all tokens" if config.pool == "avg" else "the class token"
    norms = "with layer norm" if config.norm else "without layer norm"
    layers = "1 layer" if config.layers == 1 else f"{config.layers} layers"
    lines = [
        f"# {trainer.folder.name}",
        "",
        f"{layers} of {parts}, {norms}: {task.summary}, {100 * score.accuracy:.2f} % held-out.",
        "",
        f"- Data: `{task.name}`, {len(task.labels)} classes, {task.channels} x {task.size} x {task.size}, drawn by "
        "this package for every batch afresh; no data set is downloaded or stored.",
        f"- Model: d_model {config.d_model}, {config.heads} heads, patches of {task.patch} pixels, {size:,} "
        f"parameters. The head reads {read}." + (f" {config.registers} registers." if config.registers else ""),
        f"- Command: `{command(config, trainer.folder.name)}`",
        f"- Seed: {config.seed}; {_length(trainer)} of {config.batch} pictures.",
        f"{_ACCURACY}{score}, on pictures drawn from chances that no training run uses.",
    ]
    if trainer.trains_patches:
        shapes, ground = two_shape_lens(trainer.model, 256)
        lines += [
            "- Loss: cross-entropy of the picture's label, plus that of each patch for what it shows, "
            f"weighted {config.patch_loss:g}. So the last layer's logit lens is trained to place the shapes, that of "
            "earlier layers is not.",
            "- Scenes in training: three in ten show two shapes, whose label is shared by visible area. Held-out "
            "scenes show shapes of one class, or none.",
            f"- Last layer's lens on 256 fresh scenes with two shapes: own class on {shapes} patches of shapes, "
            f"empty on {ground} patches of ground (patches that one class covers at least 60 % of).",
        ]
    lines.append(
        f"- Made {datetime.date.today().isoformat()} with torch {torch.__version__.partition('+')[0]} on a CPU "
        f"({platform.machine()})."
    )
    return "\n".join(lines) + "\n"
