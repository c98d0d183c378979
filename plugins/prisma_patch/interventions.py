"""Ready interventions, as scopes: ablation, steering, freezing.

Equation:
    Inside the scope an activation a at chosen places is 0, the mean of a reference, another example's a, a + s d, or
    what a cache holds.
Cost:
    One hook at each hook point.
Misleads:
    Zero is not a neutral value where activations have a mean far from it: prefer the mean or a resample.
Source:
    Wang et al. 2023 (mean ablation); Chan et al. 2022 (resampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, Literal, NoReturn

import torch
from prisma_lens.inputs import TOKEN_AXES, as_inputs, points_of
from torch import Tensor

from prisma_core import ActivationCache, HookContext, HookedModel, InputError
from prisma_core.plugin import Indices, Query, checked, positions_of
from prisma_patch.passes import Inputs
from prisma_patch.places import Positions, layout_at, token_positions, tokens_among

Scope = AbstractContextManager[None]


@checked
def ablate(
    model: HookedModel,
    at: Query,
    *,
    pos: Positions = None,
    heads: int | Indices | None = None,
    neurons: int | Indices | None = None,
    method: Literal["zero", "mean", "resample"] = "zero",
    reference: Tensor | Inputs | None = None,
) -> Scope:
    """Return a scope in which activations are ablated.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> image = torch.zeros(1, 3, 96, 96)
    >>> with ablate(model, ("z", 1), heads=2):
    ...     changed = model(image)

    Args:
        model: the model whose passes are changed.
        at: hook points (see ``prisma_core.hooks.query``).
        pos: tokens to ablate, as positions (of a grid, in reading order) or a subset of the layout; None for all.
        heads, neurons: heads, or places on the last axis, to ablate; None for all.
        method: ``zero``; ``mean`` over the batch and the tokens of ``reference``, each head and feature by itself;
            ``resample``: activations of ``reference``, in another order than its own.
        reference: inputs for ``mean`` and ``resample``; for ``resample`` as many as a pass has, or one that every input
            gets the activations of: another than those of the pass, which are else left as they are.

    Raises:
        UnknownName: no such hook point or subset.
        InputError: an activation has no such axis, or ``reference`` is missing.
    """
    names = points_of(model, at)
    values: dict[str, Tensor] = {}
    if method != "zero":
        if reference is None:
            raise InputError(f"method={method!r} needs reference=images, whose activations are put in.")
        with torch.no_grad():
            _, cache = model.run_with_cache(*as_inputs(model, reference), names=names, output=False)
        for name in names:
            x = cache[name]
            axes = cache.axes[name].split()
            over = [axis for axis, label in enumerate(axes) if label in ("batch", *TOKEN_AXES)]
            values[name] = x.mean(over, keepdim=True) if method == "mean" else x.roll(1, 0) if len(x) > 1 else x
    index = _indices(model, names, pos, heads, neurons)

    def edit(x: Tensor, at: HookContext) -> Tensor:
        value = values.get(at.name)
        if value is not None and any(n not in (1, size) for n, size in zip(value.shape, x.shape, strict=True)):
            raise InputError(
                f"{at.name} is {list(x.shape)} in this pass and {list(value.shape)} of the reference: give images of "
                "the same size, and as many of them or one."
            )
        return _replaced(x, index[at.name], torch.zeros_like(x) if value is None else value.to(x).expand_as(x))

    return model.hooks(dict.fromkeys(names, edit))


@checked
def steer(
    model: HookedModel,
    at: Query,
    direction: Tensor,
    scale: float = 1.0,
    *,
    pos: Positions = None,
    project: bool = False,
) -> Scope:
    """Return a scope that adds a direction to activations, or takes it out.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> x, direction = torch.zeros(1, 3, 96, 96), torch.ones(128)
    >>> with torch.no_grad(), steer(model, ("resid_post", 1), direction, 0.5, pos="cls"):
    ...     _, cache = model.run_with_cache(x)
    >>> _, before = model.run_with_cache(x)
    >>> moved = cache["resid_post", 1] - before["resid_post", 1]
    >>> torch.allclose(moved[:, 0], torch.full((1, 128), 0.5), atol=1e-4), bool((moved[:, 1:].abs() < 1e-4).all())
    (True, True)

    Args:
        model: the model whose passes are changed.
        at: hook points (see ``prisma_core.hooks.query``), such as ``("resid_post", 5)``.
        direction: along the last axis: ``[d_model]`` for the residual stream.
        scale: what the direction is multiplied with.
        pos: tokens to change, as positions or a subset of the layout; None for all.
        project: remove the activation's own part along the direction first; with ``scale=0`` that ablates it.

    Raises:
        UnknownName: no such hook point or subset.
        InputError: the direction has another width, or is zero and to be taken out.
    """
    names = points_of(model, at)
    index = _indices(model, names, pos)
    if project and not 0 < (length := float(direction.detach().cpu().double().norm())) < math.inf:
        raise InputError(f"Expected a direction of some length to take out, got one of length {length:.3g}.")

    def edit(x: Tensor, at: HookContext) -> Tensor:
        if direction.ndim != 1 or direction.shape[0] != x.shape[-1]:
            raise InputError(f"Expected a direction [{x.shape[-1]}] for {at.name}, got shape {list(direction.shape)}.")
        d = direction.to(x.device, torch.promote_types(x.dtype, torch.float32))  # its length may overflow
        moved = x + (scale * d).to(x)
        if project:
            unit = (d / d.norm()).to(x)
            moved = moved - (x @ unit)[..., None] * unit
        return _replaced(x, index[at.name], moved)

    return model.hooks(dict.fromkeys(names, edit))


@checked
def freeze(model: HookedModel, cache: ActivationCache, names: Query | None = None) -> Scope:
    """Return a scope in which activations are what a cache holds, whatever comes before them.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> logits, cache = model.run_with_cache(torch.zeros(1, 3, 96, 96))
    >>> with freeze(model, cache, "attn_out"):
    ...     model(torch.zeros(1, 3, 96, 96)).allclose(logits, atol=1e-4)
    True

    Args:
        model: the model whose passes are changed.
        cache: of the same inputs.
        names: which activations; None for all in the cache that are not derived.

    Raises:
        UnknownName: the cache lacks one, or the model has none of its hook points.
        InputError: the cache is another model's, or of inputs of other shapes.
    """
    if cache.model is not None and cache.model is not model:
        raise InputError("This cache is of another model: expected one that this very model's run_with_cache returned.")
    points = model.hook_points()
    chosen = points_of(model, [*cache] if names is None else names)
    chosen = [name for name in chosen if names is not None or not points[name].derived]
    held = {name: cache[name] for name in chosen}

    def edit(x: Tensor, at: HookContext) -> Tensor:
        if held[at.name].shape != x.shape:
            raise InputError(
                f"The cache holds {at.name} as {list(held[at.name].shape)}; this pass has {list(x.shape)}."
            )
        return held[at.name].to(x)

    return model.hooks(dict.fromkeys(chosen, edit))


class Together(AbstractContextManager[None]):
    """Several interventions as one scope."""

    def __init__(self, scopes: tuple[Scope, ...]):
        self.scopes, self.stack = scopes, ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:  # closed again where one of them cannot be opened
            for scope in self.scopes:
                stack.enter_context(scope)
            self.stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)

    def __call__(self, *inputs: object) -> NoReturn:
        raise InputError("together(...) is a scope, no model: enter it with `with`, and call the model inside.")


@checked
def together(*scopes: Scope) -> Scope:
    """Open several interventions at once; the first is the outermost.

    >>> from prisma_patch import causal
    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> with together(ablate(model, ("z", 0), heads=1), causal(model, layers=2)):
    ...     model(torch.zeros(1, 3, 96, 96)).shape
    torch.Size([1, 12])
    """
    return Together(scopes)


# -------------------------------------------------------------------- parts


Chosen = dict[tuple[int, ...], Callable[[int], list[int]]]
"""By axis, what is chosen of its places: a function of their number."""


def _indices(
    model: HookedModel, names: list[str], pos: Positions, heads: Any = None, neurons: Any = None
) -> dict[str, Chosen]:
    """Return for each hook point what is chosen along which axis of its activation."""
    points, chosen = model.hook_points(), dict[str, Chosen]()
    for name in names:
        layout = layout_at(model, [name])
        if isinstance(pos, str):
            token_positions(layout, pos)  # says now what no pass could find
        axes = points[name].axes.split()
        choices: list[tuple[Any, tuple[str, ...], str, Callable[[int], list[int]]]] = [
            (pos, ("pos", "query_pos"), "pos", partial(tokens_among, layout, pos)),
            (heads, ("head",), "heads", partial(positions_of, heads)),
            (neurons, (axes[-1],), "neurons", partial(positions_of, neurons)),
        ]
        chosen[name] = {}
        for choice, kinds, what, among in choices:
            if choice is None:
                continue
            along = next(((axes.index(kind),) for kind in kinds if kind in axes), ())
            if what == "pos" and {"row", "column"} <= {*axes}:  # a grid is positions in reading order
                if isinstance(pos, str):
                    raise InputError(f"{name} ({' '.join(axes)}) is a grid: give pos= as numbers, in reading order.")
                along = axes.index("row"), axes.index("column")
            if not along:
                raise InputError(f"{name} ({' '.join(axes)}) has no axis for {what}=.")
            chosen[name][along] = among
    return chosen


def _replaced(x: Tensor, chosen: Chosen, value: Tensor) -> Tensor:
    """Return ``x`` with ``value`` at the chosen places, and everywhere if none are chosen."""
    keep = torch.ones((), dtype=torch.bool, device=x.device)
    for along, among in chosen.items():
        n = math.prod(x.shape[axis] for axis in along)
        on = torch.zeros(n, dtype=torch.bool, device=x.device)
        on[among(n)] = True
        keep = keep & on.view([size if axis in along else 1 for axis, size in enumerate(x.shape)])
    return torch.where(keep, value.expand_as(x), x)
