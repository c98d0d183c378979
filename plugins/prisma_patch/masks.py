"""Attention masks, as scopes: knocked-out edges, and patches that see only some others.

Equation:
    The score of a hidden edge is minus infinity before the softmax; a query that may read nothing reads zeros.
Cost:
    Two hooks in each layer, whose attention is computed explicitly.
Misleads:
    What a query no longer reads is shared among the other keys, since its row still sums to one: the change is not the
    removal of one term. Models were never trained with such masks.
Source:
    Geva et al. 2023, "Dissecting Recall of Factual Associations" (attention knock-out).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from prisma_lens.inputs import vision_of
from torch import Tensor

from prisma_core import HookContext, HookedModel, InputError, NotApplicable, TokenLayout
from prisma_core.plugin import Indices, Natural, checked, layer_of, positions_of
from prisma_patch.interventions import Scope
from prisma_patch.places import Positions, token_positions, tokens_among

Layers = int | Indices | None


@checked
def knock_out(
    model: HookedModel,
    queries: Positions = None,
    keys: Positions = None,
    *,
    layers: Layers = None,
    heads: int | Indices | None = None,
) -> Scope:
    """Return a scope in which queries do not attend to keys; a query left without any key reads zeros.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> with torch.no_grad(), knock_out(model, queries="cls", keys="patches", layers=1):
    ...     _, cache = model.run_with_cache(torch.zeros(1, 3, 96, 96))
    >>> cache["pattern", 1][0, 0, 0].sum().item(), cache["pattern", 1][0, 0, 0, 0].item()
    (1.0, 1.0)

    Args:
        model: the model whose passes are changed; of a dual encoder its vision tower is (``model.text`` is another).
        queries, keys: tokens, as positions or a subset of the layout (``"cls"``, ``"patches"``); None for all.
        layers: layers to change; None for all.
        heads: heads to change; None for all.

    Raises:
        UnknownName: no such subset or layer.
        NotApplicable: the model's attention has no scores over all tokens: in windows, say.
    """
    model = vision_of(model)
    layout = model.layout_for()
    for subset in (queries, keys):
        if isinstance(subset, str):
            token_positions(layout, subset)  # says now what no pass could find

    def hidden(n_queries: int, n_keys: int) -> Tensor:
        mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
        rows = torch.tensor(tokens_among(layout, queries, n_queries))
        mask[rows[:, None], tokens_among(layout, keys, n_keys)] = True
        return mask

    return _masked(model, hidden, layers, heads, by_place=any(each is not None for each in (queries, keys)))


@checked
def causal(model: HookedModel, *, layers: Layers = None, heads: int | Indices | None = None) -> Scope:
    """Return a scope in which each patch attends to the prefix tokens and to patches not after it.

    Prefix tokens (class token, registers) attend to all, so that the model can still answer.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> with causal(model, layers=0):
    ...     model(torch.zeros(1, 3, 96, 96)).shape
    torch.Size([1, 12])

    Args:
        model, layers, heads: as in ``knock_out``.
    """
    model = vision_of(model)
    return _masked(model, lambda q, k: _except_prefix(model, torch.ones(q, k, dtype=torch.bool).triu(1)), layers, heads)


@checked
def local(
    model: HookedModel, radius: Natural = 1, *, layers: Layers = None, heads: int | Indices | None = None
) -> Scope:
    """Return a scope in which each patch attends to the prefix tokens and to patches at most ``radius`` away.

    The distance is the larger of rows and columns (a square neighbourhood), and frames are not compared.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> with local(model, radius=2):
    ...     model(torch.zeros(1, 3, 96, 96)).shape
    torch.Size([1, 12])

    Args:
        radius: in patches.
        model, layers, heads: as in ``knock_out``.

    Raises:
        NotApplicable: the model has no grid of patches.
        InputError: in a pass of images of another size than the model's own.
    """
    model = vision_of(model)
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

    def hidden(n_queries: int, n_keys: int) -> Tensor:
        if (n_queries, n_keys) != tuple(mask.shape):
            raise InputError(
                f"This pass has {n_keys} tokens, and neighbours are those of the model's own image size, "
                f"{len(mask)} tokens ({layout!r}): give images of that size."
            )
        return mask

    return _masked(model, hidden, layers, heads)


# -------------------------------------------------------------------- parts


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
    heads: int | Indices | None,
    *,
    by_place: bool = False,
) -> Scope:
    """Return a scope in which scores are minus infinity where ``hidden(queries, keys)`` says so.

    Args:
        by_place: whether it says so by places in the image, which the positions of a window are not.
    """
    points = model.hook_points()
    every = [name for name in points if name.endswith("hook_attn_scores") and layer_of(name) is not None]
    every = [name for name in every if points[name].axes.split()[-2:] == ["query_pos", "key_pos"]]
    if not every:
        raise NotApplicable("This model has no attention scores [query_pos key_pos] to mask.")
    n = 1 + max(layer_of(name) or 0 for name in every)
    layers_cut = positions_of(layers, n)
    names = [name for name in every if layer_of(name) in layers_cut]

    def on(x: Tensor) -> Tensor:
        mask = hidden(x.shape[-2], x.shape[-1]).to(x.device)
        if heads is None:
            return mask.expand_as(x)
        rows = torch.zeros(x.shape[-3], dtype=torch.bool, device=x.device)
        rows[positions_of(heads, x.shape[-3])] = True
        return (mask & rows[:, None, None]).expand_as(x)

    def scores(x: Tensor, at: HookContext) -> Tensor:
        return x.masked_fill(on(x), -torch.inf)

    def pattern(x: Tensor, at: HookContext) -> Tensor:
        # A query without any key has a row of NaN behind the softmax: it reads zeros.
        return x.masked_fill(on(x), 0.0)

    if by_place and (windows := [name for name in names if "window" in points[name].axes.split()]):
        raise NotApplicable(
            f"{windows[0]} is [{points[windows[0]].axes}]: positions there are those of a window, not of the image. "
            "Hide edges with a hook at it (model.hooks), or ablate places of the stream: ablate(model, 'resid_post', "
            "pos=...), numbered in reading order."
        )
    if heads is not None and (lacking := [name for name in names if points[name].axes.split()[-3] != "head"]):
        raise NotApplicable(f"{lacking[0]} is [{points[lacking[0]].axes}], without heads to choose.")
    patterns = [name.replace("hook_attn_scores", "hook_pattern") for name in names]
    return model.hooks({**dict.fromkeys(names, scores), **dict.fromkeys(patterns, pattern)})
