"""Training dynamics: a metric over a series of checkpoints, and the checkpoints at which it changes.

Equation:
    A series is modelled as constant pieces with noise; the change points are those that minimise the squared error.
    Their number, unless it is given, grows by one, or by two (a bump), as long as the error falls by a factor that
    fewer than ``significance`` of the series reach which are drawn anew from the fitted pieces with resampled
    residuals. The interval of a change point holds it in ``level`` of such series.
Cost:
    The metric once for each checkpoint; the resampled fits take milliseconds each.
Misleads:
    A smooth trend is cut into steps. Neighbouring checkpoints whose noise is alike make intervals too narrow. Between
    checkpoints nothing is known, and a change at the first or last ``min_size`` ones cannot be told. Look at losses by
    their logarithm.
Source:
    Truong et al. 2020 (change points; the ``ruptures`` library); Efron 1979 (bootstrap of residuals).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedModel, InputError, LoadError, PluginError, Result, tensors_of
from prisma_core.plugin import Count, Natural, Part, Seed, blaming, checked, digest, read_checkpoint, replacing, shown
from prisma_patch.sweeps import bar

Checkpoints = Mapping[int, Any]  # a model, a reference as text, or a folder as a Path: texts stay texts


@checked
def over_checkpoints(
    checkpoints: Checkpoints,
    metric: Callable[[Any], Tensor | Result | float],
    *,
    progress: bool = False,
    resume: str | Path | None = None,
) -> Result:
    """Return a metric of each checkpoint: ``[checkpoint ...]``.

    >>> import prisma_core as prisma
    >>> first, last = prisma.load("toy:dsprites-attn-1l"), prisma.load("toy:dsprites-attn-2l")
    >>> over_checkpoints({100: first, 2000: last}, lambda model: float(model.blocks[0].attn.W_O.norm())).shape
    {'checkpoint': 2}

    Args:
        checkpoints: by step, a model, a reference, or a folder that ``prisma.save`` or ``prisma train`` wrote; a
            reference or folder is loaded when its turn comes, and let go.
        metric: a function of the model: a number, a tensor, or the result of a technique, of one shape throughout.
        progress: show a bar.
        resume: a ``.safetensors`` file that keeps what was measured; a series that was stopped goes on from it. Every
            checkpoint is loaded again and its weights are compared, and the first is measured again, to tell that the
            file is of this series and metric.

    Raises:
        InputError: there are no checkpoints, or the metric has another shape at one.
        LoadError: a checkpoint cannot be loaded, or the file to resume from is of another series.
    """
    if not checkpoints:
        raise InputError("There are no checkpoints: expected {step: model, reference or folder}.")
    path = None if resume is None else _checked(Path(resume))
    states = {} if path is None or not path.is_file() else read_checkpoint(path)
    rows, about = dict[str, Tensor](), None
    for step in bar(sorted(checkpoints), "Checkpoints", progress):
        model = _loaded(checkpoints[step])
        key = str(step) if path is None else f"{step}.{digest(tensors_of(model))[:16]}"
        if any(name.partition(".")[0] == str(step) and name != key for name in states):
            raise LoadError(f"{path} is of another model at step {step}: choose another file, or remove it.")
        if rows and key in states:
            rows[key] = states[key]
            continue
        with torch.no_grad(), blaming(metric, "The metric", InputError):
            value = metric(model)
        about = value if isinstance(value, Result) else about
        row = value.values if isinstance(value, Result) else value
        if not isinstance(row, Tensor):
            if not isinstance(row, int | float):
                raise InputError(f"Expected a metric that returns a number, a tensor or a Result; got {shown(row)}.")
            row = torch.as_tensor(row)
        row = row.detach().cpu().contiguous()
        if not rows and states and not (key in states and torch.allclose(states[key], row, rtol=1e-3, atol=1e-6)):
            raise LoadError(f"{path} is of another metric or series: choose another file, or remove it.")
        if rows and row.shape != next(iter(rows.values())).shape:
            first = list(next(iter(rows.values())).shape)
            raise InputError(f"The metric is {first} at the first checkpoint and {list(row.shape)} at step {step}.")
        rows[key] = row.clone()
        if path is not None:
            with replacing(path) as fresh:
                save_file(rows | {name: states[name] for name in states if name not in rows}, fresh)
    values = torch.stack(list(rows.values()))
    axes = about.axes if about is not None else tuple(f"metric{at}" for at in range(values.ndim - 1))
    return Result(
        values,
        ("checkpoint", *axes),
        {"checkpoint": tuple(key.partition(".")[0] for key in rows), **(about.labels if about is not None else {})},
        technique=f"over_checkpoints{f' of {about.technique}' if about is not None and about.technique else ''}",
        unit=about.unit if about is not None else "the metric",
    )


@checked
def change_points(
    series: Result | Tensor,
    n: Natural | None = None,
    *,
    most: Count = 5,
    min_size: Count = 2,
    level: Part = 0.9,
    significance: Part = 0.01,
    resamples: Count = 500,
    seed: Seed = 0,
) -> Result:
    """Return the change points of a series with their intervals: ``[change bound]``, bounds low, best, high.

    A change is the index of the first checkpoint of the new piece; ``labels`` name its step. ``plot()`` draws the
    series (``tensors["series"]``) with the fitted pieces, changes and intervals.

    >>> import torch
    >>> change_points(torch.tensor([0.0] * 10 + [1.0] * 10), 1).sel(bound="best").values
    tensor([10.], dtype=torch.float64)

    Args:
        series: one number for each checkpoint: a result ``[checkpoint]`` or a tensor.
        n: how many changes; None takes as many as stand out of the noise, 0 among others.
        most: the largest number that None takes.
        min_size: the fewest checkpoints between two changes.
        level: the share of resampled series whose change lies in the interval.
        significance: the share of resampled series in which more changes may lower the error as much by chance.
        resamples: how many series are drawn.
        seed: of the draws.

    Raises:
        InputError: the series is not one number a checkpoint, too short, or holds numbers that are not finite.
        PluginError: ``ruptures`` is not installed.
    """
    values = series.values if isinstance(series, Result) else series
    if values.ndim != 1 or not bool(values.isfinite().all()):
        raise InputError(f"Expected one finite number for each checkpoint, got shape {list(values.shape)}.")
    x = values.detach().double().cpu()
    if (max(n or 0, 1) + 1) * min_size > len(x):
        raise InputError(f"{len(x)} checkpoints are too few for {n or 1} changes {min_size} or more apart.")
    generator = torch.Generator().manual_seed(seed)

    def resampled(ends: list[int]) -> Iterator[Tensor]:
        fitted = _fitted(x, ends)
        for _ in range(resamples):
            yield fitted + (x - fitted)[torch.randint(len(x), (len(x),), generator=generator)]

    best = n or 0
    while n is None:
        further = [best + more for more in (1, 2) if best + more <= most and (best + more + 1) * min_size <= len(x)]
        drawn = list(resampled(_fit(x, best, min_size)))
        for more in further:
            gains = torch.tensor([_gain(each, best, more, min_size) for each in drawn])
            if _gain(x, best, more, min_size) > gains.quantile(1 - significance / 2):  # two are tried
                best = more
                break
        else:
            break
    ends = _fit(x, best, min_size)
    drawn = torch.tensor([_fit(each, best, min_size)[:-1] for each in (resampled(ends) if best else [])])
    tail = (1 - level) / 2
    low, high = (drawn.double().quantile(q, 0) for q in (tail, 1 - tail)) if best else (torch.zeros(0), torch.zeros(0))
    point = torch.tensor(ends[:-1], dtype=torch.double)
    names = series.names("checkpoint") if isinstance(series, Result) else tuple(map(str, range(len(x))))
    starts = [0, *ends]
    means = torch.stack([x[one:two].mean() for one, two in pairwise(starts)])
    return Result(
        torch.stack([low.floor(), point, high.ceil()], -1),
        ("change", "bound"),
        {"change": tuple(f"at {names[end]}" for end in ends[:-1]), "bound": ("low", "best", "high")},
        technique="change_points",
        unit="index of the first checkpoint of the new piece",
        baseline=f"constant pieces; intervals hold {level:.0%} of {resamples} resampled series",
        tensors={"means": means, "fitted": _fitted(x, ends), "series": x},
        facts={
            "chosen": n is None,
            "steps": [names[end] for end in ends[:-1]],
            "checkpoints": list(names),
            "unit": series.unit if isinstance(series, Result) else "",
        },
    )


def _loaded(given: Any) -> Any:
    if isinstance(given, Path):
        return prisma.load(f"file:{given}")
    if not isinstance(given, str | HookedModel):
        raise InputError(f"Expected a model, a reference or a folder for each step; got {shown(given)}.")
    return prisma.load(given) if isinstance(given, str) else given


def _checked(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise InputError(f"Expected a path that ends in .safetensors to resume from, got {path}.")
    return path


def _fit(x: Tensor, n: int, min_size: int) -> list[int]:
    """Return where pieces end, the last being the end of the series."""
    if n == 0:
        return [len(x)]
    try:
        import ruptures
    except ImportError as error:
        raise PluginError(
            'Change points need ruptures, which is not installed: pip install "prisma-interp[patch]"'
        ) from error
    fit: Any = ruptures.KernelCPD(kernel="linear", min_size=min_size).fit(x.numpy()[:, None])
    return [int(end) for end in fit.predict(n_bkps=n)]


def _fitted(x: Tensor, ends: list[int]) -> Tensor:
    starts = [0, *ends[:-1]]
    pieces = [x[one:two].mean().expand(two - one) for one, two in zip(starts, ends, strict=True)]
    return torch.cat(pieces)


def _gain(x: Tensor, n: int, more: int, min_size: Count) -> float:
    """Return by what factor the squared error of ``n`` changes is larger than that of ``more``."""
    errors = [float((x - _fitted(x, _fit(x, count, min_size))).square().sum()) for count in (n, more)]
    return errors[0] / max(errors[1], 1e-12 * max(errors[0], 1e-300))
