"""Which factor of variation lives where: what a probe reads at a place, and what moves when the place is swapped.

Equation:
    probe[p, f] = R^2, on held-out images, of a ridge regression from the activation at p to factor f.
    intervention[p, f] = sum_i (r_f(a_i; p <- b_i) - r_f(a_i)) d_i / sum_i d_i^2, d_i = r_f(b_i) - r_f(a_i), for pairs
    (a_i, b_i) of held-out images drawn at random: the share of the way from a's value to b's that the readout r_f goes
    when the place alone is taken from b; pairs that are alike in a factor weigh next to nothing in it. r_f is the ridge
    regression at ``read_at``, fitted once.
Cost:
    One pass over the images, and one over the held-out ones for each place; a fit for each place and factor.
Misleads:
    A probe that reads a factor says nothing about its use: a high probe with no intervention is what the model does not
    pass on. Two places that back each other up both show a small share. Where the readout itself is poor (``readout``
    in ``tensors``) the intervention means nothing. Circular factors want sine and cosine as two columns, kinds one
    column each.
Source:
    Geiger et al. 2021 (interchange interventions); Alain and Bengio 2016 (probes); Higgins et al. 2017 and Matthey et
    al. 2017 (dSprites). Solver: scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from prisma_lens.inputs import as_input, points_of, vision_of
from prisma_lens.probes import linear_solver
from torch import Tensor

from prisma_core import HookContext, HookedModel, InputError, Result
from prisma_core.plugin import Part, Query, Seed, blaming, checked, layer_of, positions_of, shown
from prisma_patch.places import Positions, token_positions
from prisma_patch.sweeps import bar

TOKENS = ("pos", "patch")


@dataclass(frozen=True)
class Place:
    """A hook point, or one head of it."""

    name: str
    head: int | None

    @property
    def label(self) -> str:
        layer = layer_of(self.name)
        place = self.name if layer is None else f"L{layer}"
        return place if self.head is None else f"{place}H{self.head}"


@checked
def factors_by_place(
    model: HookedModel,
    images: Any,
    factors: Mapping[str, Tensor],
    *,
    at: Query = "z",
    by_head: bool = True,
    pos: Positions = None,
    read_at: str = "hook_pooled",
    held_out: Part = 0.5,
    seed: Seed = 0,
    progress: bool = False,
) -> Result:
    """Return how well each factor is read at each place, and how far it goes when the place is swapped.

    >>> import prisma_core as prisma, torch
    >>> from prisma_toy import dsprites
    >>> model = prisma.load("toy:dsprites-attn-1l")
    >>> drawn = dsprites.sample(40, torch.Generator().manual_seed(0))
    >>> found = factors_by_place(model, dsprites.draw(drawn), {"x": drawn[:, 3], "y": drawn[:, 4]})
    >>> found.axes, found.names("measure")
    (('place', 'factor', 'measure'), ('probe', 'intervention'))

    Args:
        model: any hooked model; of a dual encoder its vision tower.
        images: ``[example ...]``, as the model takes them.
        factors: by name, a number for each image ``[example]``, or several ``[example column]``.
        at: hook points (see ``prisma_core.hooks.query``).
        by_head: take each head as a place of its own, where a hook point has heads.
        pos: tokens to read (their mean) and to swap, where hook points have an axis ``pos``; None for all.
        read_at: the hook point at which factors are read out.
        held_out: the share of images that probes are measured on and that are swapped.
        seed: of the split and the pairs.
        progress: show a bar.

    Returns:
        ``[place factor measure]``, and in ``tensors`` the ``readout`` R^2 of each factor at ``read_at``.

    Raises:
        InputError: factors and images differ in number, a factor is the same throughout or not finite, or a hook point
            has no positions to choose from.
        PluginError: scikit-learn is not installed.
    """
    model = vision_of(model)
    images = as_input(model, images)
    targets = _targets(images, factors)
    names, points = points_of(model, at), model.hook_points()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    n_held = max(2, round(held_out * len(images)))
    test, train = order[:n_held], order[n_held:]
    if len(train) < 2:
        raise InputError(f"{len(images)} images leave {len(train)} to fit with held_out={held_out}: give more.")
    for factor, y in targets.items():
        if bool((y[train].std(0) == 0).any()) or bool((y[test] == y[test][:1]).all()):
            raise InputError(
                f"The factor {factor!r} is the same in all images that are fitted, or in all that are held out: draw "
                "more images that differ in it."
            )
    with torch.no_grad():
        _, cache = model.run_with_cache(images, names=[*names, read_at], output=False)
    tokens = token_positions(model.layout_for(images), pos)
    for name in names if tokens is not None else []:
        axes = points[name].axes.split()
        if "pos" not in axes:
            raise InputError(f"{name} ({' '.join(axes)}) has no positions to choose from; leave pos out.")
        tokens = positions_of(tokens, cache[name].shape[axes.index("pos")])
    places = [Place(name, head) for name in names for head in _heads(points[name].axes, cache[name], by_head)]
    readouts = {factor: _Ridge(_flat(cache[read_at]), y, train) for factor, y in targets.items()}
    values = torch.zeros(len(places), len(targets), 2, dtype=torch.double)
    partner = test.roll(1)
    for row, place in enumerate(bar(places, "Places", progress)):
        index = _index(points[place.name].axes, place.head, tokens)
        theirs = cache[place.name][partner]

        def swap(x: Tensor, at: HookContext, index: Any = index, theirs: Tensor = theirs) -> None:
            x[index] = theirs[index]

        with torch.no_grad():
            _, swapped = model.run_with_cache(images[test], names=read_at, hooks={place.name: swap}, output=False)
        read = _read(cache[place.name], points[place.name].axes, place.head, tokens)
        for column, (factor, y) in enumerate(targets.items()):
            values[row, column, 0] = _Ridge(read, y, train).score(read, y, test)
            readout = readouts[factor]
            before, after = (readout(_flat(cache[read_at][rows])) for rows in (test, partner))
            moved = readout(_flat(swapped[read_at])) - before
            values[row, column, 1] = (moved * (after - before)).sum() / (after - before).square().sum()
    whole = _flat(cache[read_at])
    return Result(
        values,
        ("place", "factor", "measure"),
        {"place": tuple(each.label for each in places), "factor": tuple(targets), "measure": ("probe", "intervention")},
        technique="factors_by_place",
        unit="R^2 on held-out images; share of the way to the other image's value",
        baseline="no swap: 0; a swap of everything that is read: 1",
        tensors={
            "readout": torch.tensor([readouts[factor].score(whole, y, test) for factor, y in targets.items()]),
        },
        facts={"train": len(train), "held_out": len(test), "read_at": read_at},
    )


class _Ridge:
    """A ridge regression from features ``[example feature]`` to a factor ``[example column]``, all of unit variance."""

    def __init__(self, x: Tensor, y: Tensor, train: Tensor):
        RidgeCV, StandardScaler = linear_solver("RidgeCV")
        from sklearn.pipeline import make_pipeline

        strengths = [10.0**power for power in range(-4, 5)]
        self.solver: Any = make_pipeline(StandardScaler(), RidgeCV(strengths))
        with blaming(RidgeCV, "scikit-learn's RidgeCV", InputError):
            self.solver.fit(x[train].numpy(), y[train].numpy())

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.solver.predict(x.numpy())).view(len(x), -1)

    def score(self, x: Tensor, y: Tensor, test: Tensor) -> float:
        return float(self.solver.score(x[test].numpy(), y[test].numpy()))


def _targets(images: Tensor, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    targets: dict[str, Tensor] = {}
    for name, given in factors.items():
        if given.ndim not in (1, 2) or len(given) != len(images):
            raise InputError(
                f"Expected the factor {name!r} of each of {len(images)} images, [example] or [example column]; "
                f"got {shown(given)}."
            )
        y = given.detach().double().cpu().reshape(len(given), -1)
        if not bool(y.isfinite().all()):
            raise InputError(f"Expected finite numbers of the factor {name!r}, got {shown(y)}.")
        if bool((y.std(0) == 0).any()):
            raise InputError(f"The factor {name!r} is the same in all {len(y)} images: draw images that differ in it.")
        targets[name] = y
    if not targets:
        raise InputError("There are no factors: expected {name: values [example]}.")
    return targets


def _heads(axes: str, x: Tensor, by_head: bool) -> Sequence[int | None]:
    names = axes.split()
    return range(x.shape[names.index("head")]) if by_head and "head" in names else [None]


def _index(axes: str, head: int | None, tokens: list[int] | None) -> tuple[Any, ...]:
    choices = {"pos": tokens, "head": head}
    return tuple(slice(None) if choices.get(axis) is None else choices[axis] for axis in axes.split())


def _read(x: Tensor, axes: str, head: int | None, tokens: list[int] | None) -> Tensor:
    """Return what a probe reads at a place, the mean over tokens: ``[example feature]``."""
    names = axes.split()
    if head is not None:
        x = x.select(names.index("head"), head)
        names.remove("head")
    axis = next((names.index(kind) for kind in TOKENS if kind in names), None)
    if axis is not None:
        x = (x if tokens is None else x.index_select(axis, torch.tensor(tokens))).mean(axis)
    return _flat(x)


def _flat(x: Tensor) -> Tensor:
    return x.detach().flatten(1).double().cpu()
