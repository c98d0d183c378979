"""Rows of activations to train on, from passes over images: for small runs; large ones read a harvest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prisma_core import HookedModel
from prisma_core.plugin import Count, LayerQuery, Seed, check_call, checked, resolve_one
from prisma_sae.binding import places_at
from prisma_sae.coder import Tokens


@checked
def activation_rows(
    model: HookedModel,
    images: Callable[[int], Tensor | None],
    hook: str | LayerQuery,
    *,
    tokens: Tokens | None = None,
    batch: Count = 1024,
    buffer: Count = 16384,
    seed: Seed = 0,
) -> Iterator[Tensor]:
    """Yield batches of rows ``[batch d]`` of a hook point, drawn at random from a buffer, as long as there are images.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> images = [torch.rand(4, 3, 96, 96), None]
    >>> next(activation_rows(model, lambda i: images[i], ("resid_post", 1), batch=64)).shape
    torch.Size([64, 128])

    Args:
        model: the model.
        images: what it takes in pass ``i``, or None where there is no more.
        hook: the hook point.
        tokens: ``cls``, ``patches``, or None for all.
        batch: rows at once.
        buffer: how many rows are drawn from; half of them are new in each round.
        seed: of the order.

    Raises:
        UnknownName: no such hook point, or several.
        InputError: it has no such tokens.
    """
    check_call(images, 1, "images=", "images(pass) -> a tensor, or None at the end")
    names = [resolve_one(hook, list(model.hook_points()))]
    places = places_at(model, names[0], tokens)
    generator, held = torch.Generator().manual_seed(seed), list[Tensor]()

    def one_pass(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, names=names, output=False)
        return places.read(cache[names[0]]).flatten(0, -2)

    index, more = 0, True
    while more:
        while sum(map(len, held)) < max(buffer, batch):
            inputs = images(index)
            if inputs is None:
                more = False
                break
            held.append(one_pass(inputs))
            index += 1
        pool = torch.cat(held) if held else torch.empty(0, 1)
        pool = pool[torch.randperm(len(pool), generator=generator)]
        out = len(pool) if not more else max(batch, len(pool) // 2 // batch * batch)
        yield from (each for each in pool[:out].split(batch) if len(each) == batch)
        held = [pool[out:]]
