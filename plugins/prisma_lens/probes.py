"""Linear probes at every layer, with a control task: what can be read off an activation.

Equation:
    argmax_c (w_c . (a - mean) / std + b_c), fitted by scikit-learn's logistic regression on a training split; accuracy
    on a held-out split. Control: the same probe for labels that are shuffled. Over a harvest the loss is the same, and
    the fit by stochastic gradients, a batch at a time.
Cost:
    One pass over the data; one fit for each hook point and its control. ``probe`` holds what is read of all data in
    memory, ``probe_harvest`` a batch.
Misleads:
    What a probe can read, the model need not use: steer along the direction, or ablate it. Accuracy far above the
    control is what counts, not accuracy.
Source:
    Alain and Bengio 2016; Hewitt and Liang 2019 (control tasks). Solver: scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from prisma_core import HookedModel, InputError, PluginError, Result
from prisma_core.plugin import Count, LayerQuery, Part, Query, Seed, blaming, checked, layer_of, several, shown
from prisma_lens.inputs import TOKEN_AXES, as_batches, as_input, points_of, vision_of


@checked
def probe(
    model: HookedModel,
    data: Iterable[tuple[Tensor, Tensor]],
    names: Query = "resid_post",
    *,
    tokens: Literal["cls", "mean", "patches", "registers"] = "mean",
    labels: Sequence[str] | None = None,
    held_out: Part = 0.25,
    control: bool = True,
    seed: Seed = 0,
    **options: Any,
) -> Result:
    """Return the held-out accuracy of a linear probe and of its control at each hook point: ``[place task]``.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> data = [(torch.rand(32, 3, 96, 96), torch.arange(32) % 2)]
    >>> probe(model, data, names="resid_post", tokens="mean").shape
    {'place': 3, 'task': 2}

    Args:
        model: any hooked model; of a dual encoder its vision tower.
        data: batches ``(images, labels)``, with labels ``[batch]``, or ``[batch patch]`` for ``tokens="patches"``.
        names: the hook points (see ``prisma_core.hooks.query``), with axes ``batch pos d``, or ``batch d``: one vector.
        tokens: what is read: one token, the mean over all (or the one vector), or every patch by itself.
        labels: names of the classes.
        held_out: the share of examples that is measured on and never trained on.
        control: fit shuffled labels too.
        seed: of the split and of the control.
        options: of scikit-learn's ``LogisticRegression``.

    Returns:
        ``values`` as above, and in ``tensors`` for each hook point ``NAME/weight`` ``[row d]``, in the activation's
        own units: a direction that attribution, lens and steering take. ``facts["rows"]`` names the class of each row:
        one for each class that was fitted, of two classes the second alone.

    Raises:
        InputError: there are no data or too few, the labels do not fit the tokens, or the activation has heads.
        PluginError: scikit-learn is not installed.
    """
    LogisticRegression, StandardScaler = linear_solver("LogisticRegression")
    model = vision_of(model)
    wanted = points_of(model, names)
    for name in wanted:
        _check_tokens(model, name)
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    truth: list[Tensor] = []
    examples: list[Tensor] = []
    rows_of, seen = list[str](), 0
    for images, given in as_batches(data):
        if given is None:
            raise InputError("Probes are fitted to labels: expected batches (images, labels).")
        images = as_input(model, images)
        with torch.no_grad():
            _, cache = model.run_with_cache(images, names=wanted, output=False)
        for name in wanted:
            x = _read(cache, name, tokens)
            rows[name].append(x.flatten(0, -2).float().cpu())
            per = x.flatten(1, -2).shape[1] if x.ndim > 2 else 1
            fit = (len(images), per) if tokens == "patches" else (len(images),)
            if tuple(given.shape) != fit:
                raise InputError(
                    f"tokens={tokens!r} needs labels {list(fit)} for {name}, one for each thing read; got "
                    f"{list(given.shape)}."
                )
        truth.append(given.flatten().cpu())
        examples.append(torch.arange(seen, seen + len(images)).repeat_interleave(per))
        seen += len(images)
    if not truth:
        raise InputError("There are no data: expected batches (images, labels).")
    target, example = torch.cat(truth), torch.cat(examples)
    test, tasks = _split(target, example, labels, held_out, control, seed)
    values = torch.zeros(len(wanted), len(tasks))
    tensors: dict[str, Tensor] = {}
    for at, name in enumerate(wanted):
        x = torch.cat(rows[name]).numpy()
        scaler = StandardScaler().fit(x[~test.numpy()])
        scaled = scaler.transform(x)
        for column, (task, y) in enumerate(tasks.items()):
            with blaming(LogisticRegression, "scikit-learn's LogisticRegression", InputError):
                solver = LogisticRegression(**({"max_iter": 500} | options))
                solver.fit(scaled[~test.numpy()], y[~test].numpy())
            values[at, column] = float(solver.score(scaled[test.numpy()], y[test].numpy()))
            if task == "probe":
                tensors |= _direction(name, solver, scaler)
                rows_of = _row_names(solver, labels)
    return _result(wanted, values, tensors, tasks, test, {"tokens": tokens, "rows": rows_of})


@checked
def probe_harvest(
    acts: Any,
    given: Tensor,
    names: str | LayerQuery | list[str | LayerQuery] | None = None,
    *,
    tokens: Literal["cls", "mean", "patches", "registers"] = "mean",
    labels: Sequence[str] | None = None,
    held_out: Part = 0.25,
    control: bool = True,
    epochs: Count = 5,
    batch: Count = 256,
    seed: Seed = 0,
    **options: Any,
) -> Result:
    """Return what ``probe`` does of activations on disk, which need not fit in memory: ``[place task]``.

    >>> from prisma_harvest import harvest
    >>> import tempfile, torch
    >>> import prisma_core as prisma
    >>> from prisma_toy import sample_scene
    >>> model = prisma.load("toy:scenes-3l")
    >>> data = [sample_scene(seed).image for seed in range(16)]
    >>> acts = harvest(model, data, ("resid_post", 1), out=tempfile.mkdtemp())
    >>> probe_harvest(acts, torch.arange(16) % 2, tokens="mean").shape
    {'place': 1, 'task': 2}

    Args:
        acts: a harvest, as ``prisma_harvest.open_harvest`` returns it.
        given: the labels ``[example]``, or ``[example patch]`` for ``tokens="patches"``.
        names: one of the harvest's hook points, or a list of them; None for all.
        tokens, labels, held_out, control, seed: as in ``probe``.
        epochs: how often all examples are read to fit. One more reading takes means and scales, one measures.
        batch: examples at once: eight runs of neighbours from anywhere, so that the order on disk does not matter.
        options: of scikit-learn's ``SGDClassifier``.

    Raises:
        InputError: it is no harvest, labels do not fit it, it lacks the tokens, or an activation has heads.
        PluginError: scikit-learn is not installed.
    """
    from prisma_harvest import Harvest

    SGDClassifier, StandardScaler = linear_solver("SGDClassifier")
    if not isinstance(acts, Harvest):
        raise InputError(f"Expected a harvest, as prisma_harvest.open_harvest returns it; got {shown(acts)}.")
    chosen = names if isinstance(names, list) else acts.names if names is None else [names]
    wanted = [acts.point(name).name for name in several(chosen, "a hook point of the harvest or a list of them")]
    run, n = max(1, batch // 8), len(acts)
    per = {name: _rows(acts, name, tokens, 0, 1).shape[1] for name in wanted}
    fit = (n, *set(per.values())) if tokens == "patches" else (n,)
    if tuple(given.shape) != fit:
        raise InputError(f"tokens={tokens!r} needs labels {list(fit)}, one for each thing read; got {shown(given)}.")
    target, example = given.flatten().cpu(), torch.arange(n).repeat_interleave(given[0].numel())
    test, tasks = _split(target, example, labels, held_out, control, seed)
    test, truths = test.view(n, -1), {task: y.view(n, -1) for task, y in tasks.items()}
    generator, classes, rows_of = torch.Generator().manual_seed(seed), target.unique().numpy(), list[str]()
    tensors, values = dict[str, Tensor](), torch.zeros(len(wanted), len(tasks))

    def read(name: str, held: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
        starts = (torch.randperm(-(-n // run), generator=generator) * run).tolist()
        for group in (starts[at : at + 8] for at in range(0, len(starts), 8)):
            at = torch.cat([torch.arange(start, min(start + run, n)) for start in group])
            x = torch.cat([_rows(acts, name, tokens, start, min(start + run, n)) for start in group])
            ours = test[at] == held
            if ours.any():
                yield x[ours].numpy(), {task: y[at][ours].numpy() for task, y in truths.items()}

    for place, name in enumerate(wanted):
        scaler = StandardScaler()
        for x, _ in read(name, held=False):
            scaler.partial_fit(x)
        with blaming(SGDClassifier, "scikit-learn's SGDClassifier", InputError):
            solvers = {task: SGDClassifier(**{"loss": "log_loss", "average": True} | options) for task in tasks}
            for _ in range(epochs):
                for x, ys in read(name, held=False):
                    for task, y in ys.items():
                        solvers[task].partial_fit(scaler.transform(x), y, classes=classes)
        for x, ys in read(name, held=True):
            right = [float((solvers[task].predict(scaler.transform(x)) == y).sum()) for task, y in ys.items()]
            values[place] += torch.tensor(right) / int(test.sum())
        tensors |= _direction(name, solvers["probe"], scaler)
        rows_of = _row_names(solvers["probe"], labels)
    return _result(wanted, values, tensors, tasks, test, {"tokens": tokens, "rows": rows_of})


def _rows(acts: Any, name: str, tokens: str, start: int, stop: int) -> Tensor:
    """Return what is read of examples of a harvest: ``[example thing d]``."""
    point = acts.point(name)
    x = point.by_token(acts.read(name, start, stop).float())
    if not point.has_tokens and x.ndim == 3:
        return x
    if x.ndim != 3:
        raise InputError(f"Probes read activations [pos d]; {name} is [{point.axes}].")
    if tokens == "mean":
        return x.mean(1, keepdim=True)
    layout = acts.layout_of(name)
    if layout is None:
        raise InputError(f"This harvest has no token layout, so tokens={tokens!r} means nothing: take 'mean'.")
    subset, positions = set(layout.positions(tokens)), acts.positions_of(name)
    if positions is None:
        raise InputError(f"Where the tokens of {name} [{point.axes}] are is not known: take tokens='mean'.")
    there = [at for at, position in enumerate(positions) if position in subset]
    if not there:
        raise InputError(f"This harvest holds no {tokens}: it is of {', '.join(acts.tokens_of(name)[:3])} and so on.")
    return x[:, there] if tokens == "patches" else x[:, there].mean(1, keepdim=True)


def linear_solver(name: str) -> tuple[Any, Any]:
    """Return a class of scikit-learn's linear models, and its scaler.

    Raises:
        PluginError: it is not installed.
    """
    try:
        from sklearn import linear_model
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise PluginError(
            "Probes are fitted by scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    return getattr(linear_model, name), StandardScaler


def _split(
    target: Tensor, example: Tensor, labels: Sequence[str] | None, held_out: float, control: bool, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return which things are held out, all of an example together, and the labels of each task.

    Raises:
        InputError: labels are no classes, or no example is left to fit.
    """
    generator, seen = torch.Generator().manual_seed(seed), int(example[-1]) + 1
    if target.is_floating_point() or bool((target < 0).any()):
        raise InputError(f"Expected labels as whole numbers from 0, got {shown(target)}.")
    if labels is not None and len(labels) <= int(target.max()):
        raise InputError(f"Expected a label for each class up to {int(target.max())}, got {shown(labels)}.")
    test = torch.isin(example, torch.randperm(seen, generator=generator)[: max(1, round(seen * held_out))])
    if test.all():
        raise InputError(f"{seen} images leave none to fit with held_out={held_out}: give more.")
    shuffled = target[torch.randperm(len(target), generator=generator)]
    return test, {"probe": target, **({"control": shuffled} if control else {})}


def _direction(name: str, solver: Any, scaler: Any) -> dict[str, Tensor]:
    """Return what a fitted probe reads along, in the activation's own units."""
    weight = torch.from_numpy(solver.coef_ / scaler.scale_).float()
    bias = torch.from_numpy(solver.intercept_).float() - weight @ torch.from_numpy(scaler.mean_).float()
    return {f"{name}/weight": weight, f"{name}/bias": bias}


def _row_names(solver: Any, labels: Sequence[str] | None) -> list[str]:
    """Return the class that each row of a probe's weights is of; of two classes there is one row, of the second."""
    classes = [int(each) for each in solver.classes_]
    names = [str(each) if labels is None else labels[each] for each in classes]
    return names[-len(solver.coef_) :]


def _result(
    wanted: list[str],
    values: Tensor,
    tensors: dict[str, Tensor],
    tasks: dict[str, Tensor],
    test: Tensor,
    facts: dict[str, Any],
) -> Result:
    layers = [layer_of(name) for name in wanted]
    by_layer = None not in layers and len(set(layers)) == len(layers)
    return Result(
        values,
        ("place", "task"),
        {
            "place": tuple(f"L{layer}" for layer in layers) if by_layer else tuple(wanted),
            "task": tuple(tasks),
        },
        technique="probe",
        unit="accuracy on held-out examples",
        baseline="the control: the same probe for shuffled labels",
        tensors=tensors,
        facts={
            **facts,
            "train": int((~test).sum()),
            "held_out": int(test.sum()),
            "names": wanted,
            "chance": float(tasks["probe"].bincount().max() / len(tasks["probe"])),
        },
    )


def _check_tokens(model: HookedModel, name: str) -> None:
    first, *places, last = model.hook_points()[name].axes.split()
    if first != "batch" or not {*places} <= {*TOKEN_AXES} or last in TOKEN_AXES:
        raise InputError(
            f"Probes read activations [batch pos d]; {name} is [{' '.join([first, *places, last])}]. Of heads take "
            "hook_attn_out, or prisma_patch.factors_by_place, which reads them one by one."
        )


def _read(cache: Any, name: str, tokens: str) -> Tensor:
    if tokens == "mean":
        x = cache[name]
        return x.flatten(1, -2).mean(1, keepdim=True) if x.ndim > 2 else x[:, None]
    if tokens == "patches":
        return cache.patches(name).flatten(1, -2)
    x = cache.cls(name) if tokens == "cls" else cache.registers(name).mean(1)
    return x[:, None]
