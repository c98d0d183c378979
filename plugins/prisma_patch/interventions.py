"""Ready interventions, as scopes: ablation, attention knock-out, masks, steering, freezing.

Equation:
    Inside the scope an activation a at chosen places is 0, the mean of a reference, another example's a, a + s d, or
    what a cache holds. A knocked-out edge has a score of minus infinity, and a query that may read nothing reads zeros.
Cost:
    One hook. Scores and patterns make their layers' attention explicit.
Misleads:
    Zero is not a neutral value where activations have a mean far from it: prefer the mean or a resample.
Source:
    Wang et al. 2023 (mean ablation); Chan et al. 2022 (resampling); Geva et al. 2023 (attention knock-out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from prisma_core import ActivationCache, HookContext, HookedModel, InputError, NotApplicable, TokenLayout
from prisma_core.plugin import Query, layer_of, positions_of
from prisma_patch.patching import Positions, as_inputs, token_positions
from prisma_patch.sweep import Inputs

if TYPE_CHECKING:
    from collections.abc import Generator

Layers = int | Sequence[int] | None
Scope = AbstractContextManager[None]


def ablate(
    model: HookedModel,
    at: Query,
    *,
    pos: Positions = None,
    heads: int | Sequence[int] | None = None,
    neurons: int | Sequence[int] | None = None,
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
        pos: tokens to ablate, as positions or a subset of the layout; None for all.
        heads, neurons: heads, or places on the last axis, to ablate; None for all.
        method: ``zero``; ``mean`` over the batch and the tokens of ``reference``, each head and feature by itself;
            ``resample``: activations of ``reference``, in another order than its own.
        reference: inputs for ``mean`` and ``resample``; for ``resample`` as many as a pass has, or one.

    Raises:
        UnknownName: no such hook point or subset.
        InputError: an activation has no such axis, or ``reference`` is missing.
    """
    names = model.resolve(at)
    values: dict[str, Tensor] = {}
    if method != "zero":
        if reference is None:
            raise InputError(f"method={method!r} needs reference=images, whose activations are put in.")
        with torch.no_grad():
            _, cache = model.run_with_cache(*as_inputs(reference), names=names, output=False)
        for name in names:
            x = cache[name]
            axes = model.hook_points()[name].axes.split()
            over = [axis for axis, label in enumerate(axes) if label in ("batch", "pos", "query_pos")]
            values[name] = x.mean(over, keepdim=True) if method == "mean" else x.roll(1, 0) if len(x) > 1 else x
    points = model.hook_points()
    tokens = token_positions(model.layout_for(), pos)
    chosen = {name: _index(name, points[name].axes, tokens, heads, neurons) for name in names}

    def edit(x: Tensor, at: HookContext) -> Tensor:
        value = values.get(at.name)
        if value is not None and value.shape[0] not in (1, x.shape[0]):
            raise InputError(
                f"{at.name}: {x.shape[0]} inputs against a reference of {value.shape[0]}: give as many, or one."
            )
        return _replaced(x, chosen[at.name], torch.zeros_like(x) if value is None else value.to(x).expand_as(x))

    return model.hooks(dict.fromkeys(names, edit))


def knock_out(
    model: HookedModel,
    queries: Positions = None,
    keys: Positions = None,
    *,
    layers: Layers = None,
    heads: int | Sequence[int] | None = None,
) -> Scope:
    """Return a scope in which queries do not attend to keys; a query left without any key reads zeros.

    Args:
        model: the model whose passes are changed.
        queries, keys: tokens, as positions or a subset of the layout (``"cls"``, ``"patches"``); None for all.
        layers: layers to change; None for all.
        heads: heads to change; None for all.

    Raises:
        UnknownName: no such subset or layer.
        NotApplicable: the model's attention has no scores over all tokens.
    """
    layout = model.layout_for()
    rows, columns = token_positions(layout, queries), token_positions(layout, keys)

    def hidden(n_queries: int, n_keys: int) -> Tensor:
        mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
        mask[_grid(rows, n_queries, columns, n_keys)] = True
        return mask

    return _masked(model, hidden, layers, heads)


def causal(model: HookedModel, *, layers: Layers = None, heads: int | Sequence[int] | None = None) -> Scope:
    """Return a scope in which each patch attends to the prefix tokens and to patches not after it.

    Prefix tokens (class token, registers) attend to all, so that the model can still answer.

    Args:
        model, layers, heads: as in ``knock_out``.
    """
    return _masked(model, lambda q, k: _except_prefix(model, torch.ones(q, k, dtype=torch.bool).triu(1)), layers, heads)


def local(
    model: HookedModel, radius: int = 1, *, layers: Layers = None, heads: int | Sequence[int] | None = None
) -> Scope:
    """Return a scope in which each patch attends to the prefix tokens and to patches at most ``radius`` away.

    The distance is the larger of rows and columns (a square neighbourhood), and frames are not compared.

    Args:
        radius: in patches.
        model, layers, heads: as in ``knock_out``.

    Raises:
        NotApplicable: the model has no grid of patches.
    """
    layout = model.layout_for()
    if layout is None:
        raise NotApplicable("This model has no token layout, so no patch has neighbours.")
    places = torch.arange(layout.n_patches)
    if layout.order == "row column frame":
        places = places // layout.frames
    row, column = places // layout.columns % layout.rows, places % layout.columns
    far = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) > radius
    mask = torch.zeros(layout.n_tokens, layout.n_tokens, dtype=torch.bool)
    mask[layout.n_prefix :, layout.n_prefix :] = far
    return _masked(model, lambda q, k: mask, layers, heads)


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

    Args:
        model: the model whose passes are changed.
        at: hook points (see ``prisma_core.hooks.query``), such as ``("resid_post", 5)``.
        direction: along the last axis: ``[d_model]`` for the residual stream.
        scale: what the direction is multiplied with.
        pos: tokens to change, as positions or a subset of the layout; None for all.
        project: remove the activation's own part along the direction first; with ``scale=0`` that ablates it.

    Raises:
        UnknownName: no such hook point or subset.
        InputError: the direction has another width.
    """
    names, points = model.resolve(at), model.hook_points()
    tokens = token_positions(model.layout_for(), pos)
    chosen = {name: _index(name, points[name].axes, tokens, None, None) for name in names}

    def edit(x: Tensor, at: HookContext) -> Tensor:
        if direction.ndim != 1 or direction.shape[0] != x.shape[-1]:
            raise InputError(f"Expected a direction [{x.shape[-1]}] for {at.name}, got shape {list(direction.shape)}.")
        d = direction.to(x)
        moved = x + scale * d
        if project:
            unit = d / d.norm()
            moved = moved - (x @ unit)[..., None] * unit
        return _replaced(x, chosen[at.name], moved)

    return model.hooks(dict.fromkeys(names, edit))


def freeze(model: HookedModel, cache: ActivationCache, names: Query | None = None) -> Scope:
    """Return a scope in which activations are what a cache holds, whatever comes before them.

    Args:
        model: the model whose passes are changed.
        cache: of the same inputs.
        names: which activations; None for all in the cache that are not derived.

    Raises:
        UnknownName: the cache lacks one.
    """
    chosen = (
        [name for name in cache if not model.hook_points()[name].derived] if names is None else model.resolve(names)
    )
    held = {name: cache[name] for name in chosen}

    def edit(x: Tensor, at: HookContext) -> Tensor:
        if held[at.name].shape != x.shape:
            raise InputError(
                f"The cache holds {at.name} as {list(held[at.name].shape)}; this pass has {list(x.shape)}."
            )
        return held[at.name].to(x)

    return model.hooks(dict.fromkeys(chosen, edit))


@contextmanager
def together(*scopes: Scope) -> Generator[None]:
    """Open several interventions at once; the first is the outermost."""
    with ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(scope)
        yield


# -------------------------------------------------------------------- parts


def _index(
    name: str, axes: str, tokens: list[int] | None, heads: Any, neurons: Any
) -> dict[int, list[int] | int | Sequence[int]]:
    """Return what is chosen along which axis of an activation."""
    own = axes.split()
    found: dict[int, Any] = {}
    wanted = ((tokens, ("pos", "query_pos"), "pos"), (heads, ("head",), "heads"), (neurons, (own[-1],), "neurons"))
    for given, kinds, what in wanted:
        if given is None:
            continue
        at = next((own.index(kind) for kind in kinds if kind in own), None)
        if at is None:
            raise InputError(f"{name} ({axes}) has no axis for {what}=.")
        found[at] = given
    return found


def _replaced(x: Tensor, chosen: dict[int, Any], value: Tensor) -> Tensor:
    """Return ``x`` with ``value`` at the chosen places, and everywhere if none are chosen."""
    keep = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, given in chosen.items():
        on = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device)
        on[positions_of(given, x.shape[axis])] = True
        keep = keep & on.view([-1 if each == axis else 1 for each in range(x.ndim)])
    return torch.where(keep, value.expand_as(x), x)


def _grid(rows: list[int] | None, n_rows: int, columns: list[int] | None, n_columns: int) -> tuple[Tensor, Tensor]:
    first = torch.tensor(positions_of(rows, n_rows))[:, None]
    return first, torch.tensor(positions_of(columns, n_columns))[None, :]


def _except_prefix(model: HookedModel, mask: Tensor) -> Tensor:
    layout: TokenLayout | None = model.layout_for()
    n = 0 if layout is None else layout.n_prefix
    mask[:n] = False
    mask[:, :n] = False
    return mask


def _masked(
    model: HookedModel,
    hidden: Callable[[int, int], Tensor],
    layers: Layers,
    heads: int | Sequence[int] | None,
) -> Scope:
    """Return a scope in which scores are minus infinity where ``hidden(queries, keys)`` says so."""
    points = model.hook_points()
    every = [name for name in points if name.endswith("hook_attn_scores") and layer_of(name) is not None]
    every = [name for name in every if points[name].axes.split()[-2:] == ["query_pos", "key_pos"]]
    if not every:
        raise NotApplicable("This model has no attention scores [query_pos key_pos] to mask.")
    n = 1 + max(layer_of(name) or 0 for name in every)
    wanted = positions_of(layers, n)
    names = [name for name in every if layer_of(name) in wanted]

    def on(x: Tensor) -> Tensor:
        mask = hidden(x.shape[-2], x.shape[-1]).to(x.device)
        if heads is None:
            return mask.expand_as(x)
        chosen = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        chosen[positions_of(heads, x.shape[1])] = True
        return (mask & chosen[:, None, None]).expand_as(x)

    def scores(x: Tensor, at: HookContext) -> Tensor:
        return x.masked_fill(on(x), -torch.inf)

    def pattern(x: Tensor, at: HookContext) -> Tensor:
        # A query without any key has a row of NaN behind the softmax: it reads zeros.
        return x.masked_fill(on(x), 0.0)

    patterns = [name.replace("hook_attn_scores", "hook_pattern") for name in names]
    return model.hooks({**dict.fromkeys(names, scores), **dict.fromkeys(patterns, pattern)})
