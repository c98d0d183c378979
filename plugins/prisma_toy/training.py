"""Train a toy model: deterministic for a seed, with checkpoints, and the same after a kill as without one."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from pydantic import ValidationError
from torch import Tensor

from prisma_core import InputError, LoadError, ZooModel
from prisma_core.plugin import holding, read_fields, read_json, write_text
from prisma_toy import checkpoints
from prisma_toy.config import Config
from prisma_toy.task import Task
from prisma_toy.tasks import task


@dataclass(frozen=True)
class Progress:
    """One step of training: how many are done, the loss, and the mean of the task's measure over the batch."""

    step: int
    loss: float
    score: float


class Trainer:
    """One run in one folder.

    Every batch is a function of seed and step alone, so weights, optimizer and step are the whole state.

    Args:
        config: of a new run.
        folder: where its files go.

    Raises:
        InputError: the folder holds something already.
    """

    def __init__(self, config: Config, folder: Path):
        self._build(config, folder)
        folder.mkdir(parents=True, exist_ok=True)
        with holding(folder):
            if any(not path.name.startswith(".prisma-") for path in folder.iterdir()):  # those are of killed runs
                raise InputError(
                    f"{folder} is not empty. Choose another folder with --out, or go on with a run in it with --resume."
                )
            write_text(folder / checkpoints.CONFIG, config.model_dump_json(indent=1) + "\n")
            checkpoints.save_model(folder, self.model, 0)
            self._save()

    @classmethod
    def resume(cls, folder: Path) -> Trainer:
        """Return a run as it was when its state was last saved.

        Raises:
            LoadError: the folder holds no run, or a damaged one.
        """
        path = folder / checkpoints.CONFIG
        if not os.path.lexists(path):
            raise LoadError(
                f"{folder} holds no {checkpoints.CONFIG}, so there is no run to resume: start one without --resume."
            )
        config = read_fields(Config, read_json(path), f"{path} does not describe a run")
        self = cls.__new__(cls)
        self._build(config, folder)
        if (folder / checkpoints.STATE).exists():
            self._restore()
        else:  # killed before the first state was saved
            checkpoints.save_model(folder, self.model, 0)
            self._save()
        checkpoints.rewind_log(folder, self.step)
        return self

    def _build(self, config: Config, folder: Path) -> None:
        self.config, self.folder, self.step = config, folder, 0
        self.task: Task = task(config.data)
        self.model: ZooModel = self.task.objective.model(self.task, config)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
            foreach=False,
        )

    # ---------------------------------------------------------------- state

    def _save(self) -> None:
        tensors = {f"model.{name}": parameter for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        checkpoints.save_state(self.folder, tensors, {"step": self.step})

    def _restore(self) -> None:
        tensors, facts = checkpoints.load_state(self.folder)
        self.step = int(facts["step"])
        expected = {f"model.{name}" for name, _ in self.model.named_parameters()}
        if missing := sorted(expected - set(tensors)):
            raise LoadError(f"{self.folder / checkpoints.STATE} lacks {', '.join(missing[:3])}.")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
                if self.step:
                    keys = ("step", "exp_avg", "exp_avg_sq")
                    self.optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}

    # ---------------------------------------------------------------- training

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a short warm-up, then a cosine down to a fiftieth."""
        warm = min(100, self.config.steps // 10 + 1)
        share = 0.5 * (1 + math.cos(math.pi * step / self.config.steps))
        return self.config.lr * min(1.0, (step + 1) / warm) * (0.02 + 0.98 * share)

    def run(self, save_every: float = 20.0, log_every: int = 10) -> Iterator[Progress]:
        """Train to the last step, and yield after every one.

        Args:
            save_every: seconds between savings of the state; a kill costs no more than that.
            log_every: steps between rows of the log.

        Raises:
            LoadError: the disk refuses.
        """
        torch.set_num_threads(self.config.threads)
        saved = time.monotonic()
        with self._log() as log:
            while self.step < self.config.steps:
                progress = self._advance()
                if self.step % log_every == 0 or self.step in (1, self.config.steps):
                    log.write(json.dumps(vars(progress)) + "\n")
                    log.flush()
                keep = checkpoints.due(self.step, self.config.steps)
                if keep:
                    checkpoints.save_model(self.folder, self.model, self.step)
                if keep or time.monotonic() - saved >= save_every:
                    os.fsync(log.fileno())  # no row of a saved step is lost in a power cut
                    self._save()
                    saved = time.monotonic()
                yield progress

    @contextmanager
    def _log(self) -> Generator[TextIO]:
        path = self.folder / checkpoints.LOG
        try:
            with open(path, "a", encoding="utf-8") as log:
                yield log
        except OSError as error:
            raise LoadError(f"{path} cannot be written: {error.strerror}. --resume goes on with the run.") from error

    def _advance(self) -> Progress:
        config = self.config
        batch = self.task.batch(config.batch, "train", config.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.model.train()
        # The fused kernel's backward is slow in bfloat16, and asking for patterns replaces it.
        explicit = {"*hook_pattern": _as_it_is} if config.bf16 else None
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16), self.model.hooks(explicit):
            loss, values = self.task.objective.loss(self.model, batch, config)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=False)
        self.optimizer.step()
        self.model.eval()
        self.step += 1
        return Progress(self.step, round(float(loss.detach()), 6), float(values.mean()))


def _as_it_is(pattern: Tensor, at: object) -> None:
    """Ask for the pattern, and leave it."""


def start(given: dict[str, Any], folder: Path, resume: bool) -> Trainer:
    """Return a new run, or one to go on with.

    Args:
        given: the options somebody stated; a run that goes on must have been started with the same.

    Raises:
        InputError: options that make no run, or differ from those of the run to resume.
        LoadError: there is no run to resume.
    """
    if not resume:
        try:
            config = Config.model_validate(given)
        except ValidationError as error:
            problems = [f"--{'-'.join(map(str, e['loc'])).replace('_', '-')}: {e['msg']}" for e in error.errors()]
            raise InputError(f"{'; '.join(problems)}.") from error
        return Trainer(config, folder)
    trainer = Trainer.resume(folder)
    have = trainer.config.model_dump()
    if other := [f"--{name.replace('_', '-')} {have[name]}" for name in given if given[name] != have[name]]:
        raise InputError(f"The run in {folder} was started with {', '.join(other)}. Leave these out to resume it.")
    return trainer
