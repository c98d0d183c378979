"""Linear probes at every layer, with a control task: what can be read off an activation.

Equation:
    argmax_c (w_c . (a - mean) / std + b_c), fitted by scikit-learn's logistic regression on a training split; accuracy
    on a held-out split. Control: the same probe for labels that are shuffled.
Cost:
    One pass over the data; one fit for each hook point and its control.
Misleads:
    What a probe can read, the model need not use: steer along the direction, or ablate it. Accuracy far above the
    control is what counts, not accuracy.
Source:
    Alain and Bengio 2016; Hewitt and Liang 2019 (control tasks). Solver: scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from prisma_core import HookedModel, InputError, PluginError, Result
from prisma_core.plugin import Part, Query, blaming, checked, layer_of, shown
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
    seed: int = 0,
    **options: Any,
) -> Result:
    """Return the held-out accuracy of a linear probe and of its control at each hook point: ``[place task]``.

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
        ``values`` as above, and in ``tensors`` for each hook point ``NAME/weight`` ``[class d]``, in the activation's
        own units: a direction that attribution, lens and steering take.

    Raises:
        InputError: there are no data or too few, the labels do not fit the tokens, or the activation has heads.
        PluginError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise PluginError(
            "Probes are fitted by scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    model = vision_of(model)
    wanted = points_of(model, names)
    for name in wanted:
        _check_tokens(model, name)
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    truth: list[Tensor] = []
    examples: list[Tensor] = []
    seen = 0
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
                f"tokens={tokens!r} needs labels {list(fit)}, one for each thing read; got {list(given.shape)}."
            )
        truth.append(given.flatten().cpu())
        examples.append(torch.arange(seen, seen + len(images)).repeat_interleave(per))
        seen += len(images)
    if not truth:
        raise InputError("There are no data: expected batches (images, labels).")
    generator = torch.Generator().manual_seed(seed)
    target, example = torch.cat(truth), torch.cat(examples)
    if target.is_floating_point() or bool((target < 0).any()):
        raise InputError(f"Expected labels as whole numbers from 0, got {shown(target)}.")
    if labels is not None and len(labels) <= int(target.max()):
        raise InputError(f"Expected a label for each class up to {int(target.max())}, got {shown(labels)}.")
    test = torch.isin(example, torch.randperm(seen, generator=generator)[: max(1, round(seen * held_out))])
    if test.all():
        raise InputError(f"{seen} images leave none to fit with held_out={held_out}: give more.")
    shuffled = target[torch.randperm(len(target), generator=generator)]
    tasks = {"probe": target, **({"control": shuffled} if control else {})}
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
                weight = torch.from_numpy(solver.coef_ / scaler.scale_).float()
                tensors[f"{name}/weight"] = weight
                tensors[f"{name}/bias"] = (
                    torch.from_numpy(solver.intercept_).float() - weight @ torch.from_numpy(scaler.mean_).float()
                )
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
            "tokens": tokens,
            "train": int((~test).sum()),
            "held_out": int(test.sum()),
            "labels": list(labels or ()),
            "names": wanted,
            "chance": float(target.bincount().max() / len(target)),
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
