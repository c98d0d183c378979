"""Training of sparse coders by overcomplete's models and losses, from any iterator of rows.

Equation:
    The mean square of x - decode(encode(x)); TopK and BatchTopK add AuxK on what features that did not fire would
    explain; JumpReLU adds the means of L1 and L0; Matryoshka is the mean over prefixes of the features.
Cost:
    Memory for the coder, its optimiser and one batch. Rows are read once, whatever the number of coders.
Misleads:
    A coder with a low loss can have split, absorbed or dead features. Evaluate it, and train two seeds.
Source:
    Gao et al. 2024; Bussmann et al. 2024, 2025; Rajamanoharan et al. 2024; Fel et al. 2025; overcomplete 0.3.0.
"""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from prisma_core import InputError, PluginError
from prisma_core.plugin import Count, Facts, check_call, checked, format_fields, shown
from prisma_sae.checkpoint import Checkpoint
from prisma_sae.coder import CoderFacts, SparseCoder
from prisma_sae.formats import overcomplete as reader

Method = Literal["topk", "batchtopk", "jumprelu", "matryoshka", "archetypal"]


class TrainConfig(Facts):
    """Options of training.

    Attributes:
        kind: the method; ``matryoshka`` is TopK with nested losses, ``archetypal`` TopK with a dictionary made of rows.
        d_sae: features.
        k: features that are on in each row; of BatchTopK on average, of JumpReLU not used.
        lr: the highest learning rate, reached after ``warmup`` of the steps and gone at the end.
        penalty: weight of the second loss: AuxK (default 0.1), or JumpReLU's L1 and L0 (default 0.3).
        groups: of a Matryoshka coder, the lengths of the prefixes; default an eighth, a quarter, a half, all.
        points: of an archetypal coder, how many of the first rows its dictionary is made of.
        delta: of an archetypal coder, how far an atom may be from them.
        seed: of the weights.
    """

    kind: Method = "topk"
    d_sae: int = Field(gt=0, le=1 << 24)
    k: int = Field(default=16, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    penalty: float | None = None
    groups: tuple[int, ...] = ()
    points: int = Field(default=1024, gt=0)
    delta: float = Field(default=1.0, ge=0)
    seed: int = Field(default=0, ge=0, lt=1 << 63)


@checked
def train(
    rows: Iterable[Tensor],
    config: TrainConfig | Mapping[str, TrainConfig],
    *,
    steps: Count,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, Mapping[str, float]], None] | None = None,
    resume: str | Path | None = None,
) -> Any:
    """Train a coder, or several from one read of the rows; on the device where the rows are.

    >>> rows = (torch.randn(64, 8) for _ in range(20))
    >>> train(rows, TrainConfig(d_sae=16, k=4), steps=20).facts.kind  # doctest: +SKIP
    'topk'

    Args:
        rows: batches ``[row d]``, shuffled: of a harvest, ``open_harvest(path).rows(name, batch, shuffle=...)``.
        config: what to train, or several by name.
        steps: batches to train on; rows behind them are not read.
        about: facts of the coder: ``model``, ``weights``, ``hook``, ``tokens``.
        progress: called after each step with its number and the losses by name.
        resume: a ``.pt`` file that keeps coders and optimisers so far; the same call goes on from it, to the same
            coders. Rows of steps that were taken are read and passed over, so they have to come in the same order.

    Returns:
        A coder, or coders by name.

    Raises:
        InputError: there are fewer batches than steps, they are not ``[row d]`` of finite numbers, ``about`` is of no
            coder, or a loss is not finite.
        LoadError: the file to resume from is damaged, or of another training or other rows.
        PluginError: overcomplete is not installed.
    """
    configs = {"": config} if isinstance(config, TrainConfig) else dict(config)
    if steps < 1 or not configs:
        raise InputError(f"Expected at least one step and one coder, got {steps} and {len(configs)}.")
    about = _about(about or {})
    batches = _batches(rows, steps)
    first = [next(batches)]
    needed = max([each.points for each in configs.values() if each.kind == "archetypal"], default=0)
    while sum(map(len, first)) < needed and len(first) < steps:
        first.append(next(batches))
    runs = {name: _Run(each, torch.cat(first), steps) for name, each in configs.items()}
    if progress is not None:
        check_call(progress, 2, "progress=", "progress(step, losses)")
    kept = None if resume is None else Checkpoint(Path(resume), configs, steps, first[0])
    done = 0 if kept is None else kept.read(runs)
    for step, batch in enumerate(chain(first, batches), start=1):
        if step <= done:
            if kept is not None and step == done:
                kept.compare(batch)
            continue
        losses = {name: run.step(batch) for name, run in runs.items()}
        if lost := [name for name, loss in losses.items() if not math.isfinite(loss)]:
            which = f" of {lost[0]!r}" if lost[0] else ""
            raise InputError(f"The loss{which} is {losses[lost[0]]} at step {step}: give a lower lr=.")
        if kept is not None:
            kept.write(runs, step, batch)
        if progress is not None:
            progress(step, losses)
    coders = {name: run.coder(about) for name, run in runs.items()}
    return coders[""] if isinstance(config, TrainConfig) else coders


def _about(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return facts that a coder can have, before anything long."""
    try:
        CoderFacts.model_validate({"kind": "topk", "d_in": 1, "d_sae": 1, "d_out": 1, **about})
    except ValidationError as error:
        raise InputError(f"about= does not fit a sparse coder: {format_fields(error)}.") from error
    return about


def _batches(rows: Iterable[Tensor], steps: int) -> Iterator[Tensor]:
    iterator, width = iter(rows), None
    for step in range(steps):
        batch: Any = next(iterator, None)
        if batch is None:
            raise InputError(f"The rows ended after {step} batches of {steps}: give steps={step}, or go round them.")
        if not isinstance(batch, Tensor) or batch.ndim != 2 or not batch.is_floating_point():
            came = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else shown(batch)
            raise InputError(f"Expected batches of rows [row d] of floating point numbers, got {came}.")
        if width not in (None, batch.shape[1]):
            raise InputError(f"The first batch has rows of {width} numbers, batch {step} of {batch.shape[1]}.")
        width, batch = batch.shape[1], batch.detach().float()
        if not len(batch) or not bool(torch.isfinite(batch).all()):
            what = "numbers that are NaN or infinite in float32" if len(batch) else "no rows"
            raise InputError(f"Batch {step} holds {what}.")
        yield batch


def library() -> Any:
    """Return ``overcomplete.sae``.

    Raises:
        PluginError: it is not installed, or does not import.
    """
    try:
        return importlib.import_module("overcomplete.sae")
    except (ImportError, AttributeError) as error:  # with matplotlib 3.9 and later it misses a name
        raise PluginError(
            f"Training needs overcomplete, which does not import ({error}): pip install 'prisma-interp[sae-train]'"
        ) from error


class _Run:
    """A coder in training, on rows less their mean and divided by their mean length over sqrt(d)."""

    def __init__(self, config: TrainConfig, sample: Tensor, steps: int):
        self.config = config
        self.mean = sample.mean(0)
        spread = (sample - self.mean).norm(dim=-1).mean()
        if not bool(spread.isfinite()):
            raise InputError("The rows are too large for float32: their squares are infinite.")
        if bool(spread <= 1e-6 * sample.norm(dim=-1).mean()):  # rounding alone, or one row
            raise InputError(
                f"The first rows ({len(sample)}) are alike, and how far rows are apart is the unit of training: "
                "give larger batches, shuffled."
            )
        self.scale = spread / sample.shape[1] ** 0.5
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = _model(config, (sample - self.mean) / self.scale)
        self.groups = config.groups or tuple(config.d_sae // part for part in (8, 4, 2, 1) if config.d_sae >= part)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        rise = max(1, int(config.warmup * steps))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
        )
        self.model.train()

    def step(self, batch: Tensor) -> float:
        """Take one step, and return the loss."""
        x = (batch - self.mean) / self.scale
        if self.config.kind == "batchtopk":  # overcomplete counts over the whole batch
            self.model.top_k = self.config.k * len(x)
        before, codes, output = self.model(x)
        loss = self._loss(x, output, before, codes)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def _loss(self, x: Tensor, output: Tensor, before: Tensor, codes: Tensor) -> Tensor:
        kind, penalty, dictionary = self.config.kind, self.config.penalty, self.model.get_dictionary()
        if kind == "matryoshka":
            return torch.stack([(x - codes[:, :n] @ dictionary[:n]).square().mean() for n in self.groups]).mean()
        if kind == "jumprelu":
            heaviside = importlib.import_module("overcomplete.sae.jump_sae").heaviside
            on = heaviside(before, self.model.thresholds.exp(), self.model.kernel_fn, self.model.bandwidth)
            sparsity = codes.abs().mean() + on.mean()  # L0 alone moves thresholds, and leaves features spread out
            return (x - output).square().mean() + (0.3 if penalty is None else penalty) * sparsity
        losses = importlib.import_module("overcomplete.sae.losses")
        return losses.top_k_auxiliary_loss(x, output, before, codes, dictionary, 0.1 if penalty is None else penalty)

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on; overcomplete keeps thresholds beside its state dict."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part.state_dict() for name, part in parts.items()} | {"beside": dict(self._beside())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        for name, value in state["beside"].items():
            path, _, attribute = name.rpartition("/")
            setattr(self.model.get_submodule(path), attribute, value)

    def _beside(self) -> Iterator[tuple[str, Any]]:
        for path, module in self.model.named_modules():
            for name, value in vars(module).items():
                if name != "training" and isinstance(value, Tensor | int | float | None):
                    yield f"{path}/{name}", value

    def coder(self, about: Mapping[str, Any]) -> SparseCoder:
        """Return the trained coder, with the standardisation inside its weights."""
        with torch.no_grad():
            self.model.cpu().eval()
        with tempfile.TemporaryDirectory() as folder:  # through the reader of overcomplete's models
            file = Path(folder) / "model.pth"
            torch.save(self.model, file)
            made = reader.read(file)
        changes: dict[str, Any] = {
            "kind": self.config.kind,
            "k": None if self.config.kind == "jumprelu" else self.config.k,
            "groups": self.groups if self.config.kind == "matryoshka" else (),
            "layout": "trained with overcomplete",
            "more": {"training": self.config.model_dump(mode="json")},
            **about,
        }
        facts = CoderFacts.model_validate({**made.facts.model_dump(), **changes})
        return SparseCoder(facts, _folded(made.tensors(), self.mean.cpu(), self.scale.cpu()))


def _model(config: TrainConfig, sample: Tensor) -> Any:
    sae, d = library(), sample.shape[1]
    if config.k > config.d_sae or any(not 0 < n <= config.d_sae for n in config.groups):
        raise InputError(f"Expected k and groups of at most d_sae={config.d_sae}, got {config.k} and {config.groups}.")
    groups = config.groups
    if groups and (config.kind != "matryoshka" or sorted(set(groups)) != list(groups) or groups[-1] != config.d_sae):
        raise InputError(
            f"groups= are of a matryoshka coder, each longer than the one before, the last all d_sae={config.d_sae} "
            f"features; got {groups} for a {config.kind} one."
        )
    common: dict[str, Any] = {"device": str(sample.device)}
    if config.kind == "archetypal":
        points = sample[: config.points]
        return sae.RATopKSAE(d, config.d_sae, points=points, top_k=config.k, delta=config.delta, **common)
    if config.kind == "jumprelu":
        return sae.JumpSAE(d, config.d_sae, bandwidth=0.1, **common)
    kind = sae.BatchTopKSAE if config.kind == "batchtopk" else sae.TopKSAE
    return kind(d, config.d_sae, top_k=config.k, **common)


def _folded(tensors: dict[str, Tensor], mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return the tensors of the same coder on raw rows.

    With x' = (x - m) / s: W_enc / s, b_enc - m W_enc / s, s W_dec, s b_dec + m. Features stay as they are.
    """
    encoder = tensors["W_enc"].double() / scale.double()
    changed = {
        "W_enc": encoder,
        "b_enc": tensors["b_enc"].double() - mean.double() @ encoder,
        "W_dec": tensors["W_dec"].double() * scale.double(),
        "b_dec": tensors["b_dec"].double() * scale.double() + mean.double(),
    }
    return tensors | {name: tensor.float() for name, tensor in changed.items()}
