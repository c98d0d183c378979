"""The sweep over all (layer, head) of one image, against hand-written hooks on timm, and against its limit.

All three sides run in turn in one process, with the same weights:

- the loop: timm's own model and one forward hook, a whole pass for each head;
- the limit: the block passes that must be made, bare: from the patched layer on, variants batched, with the tokens that
  still matter behind the last attention, and with the class token patched in the patched block too; no hooks;
- ours: ``prisma_patch.patch_heads``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import timm
import torch
from prisma_patch import logit_difference, patch_heads
from timing import Options, Row, Side, draw, once
from torch import Tensor

import prisma_core as prisma

MODELS = ("vit_base_patch32_224", "vit_base_patch16_224")
METRIC = logit_difference(1, 2)
BATCH = 64


@torch.no_grad()
def loop(upstream: Any, image: Tensor, other: Tensor, pos: slice) -> Tensor:
    """Return the effect of each head ``[layer head]``, by one whole pass of timm's model each."""
    held: list[Tensor] = []
    handles = [
        block.attn.proj.register_forward_pre_hook(lambda module, args: held.append(args[0]))
        for block in upstream.blocks
    ]
    upstream(other)
    for handle in handles:
        handle.remove()
    base, effects = METRIC(upstream(image)), []
    for block, theirs in zip(upstream.blocks, held, strict=True):
        heads, width = block.attn.num_heads, block.attn.head_dim
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)

            def swap(module: object, args: tuple[Tensor], part: slice = part, theirs: Tensor = theirs) -> Tensor:
                z = args[0].clone()
                z[:, pos, part] = theirs[:, pos, part]
                return z

            handle = block.attn.proj.register_forward_pre_hook(swap)
            effects.append(METRIC(upstream(image)) - base)
            handle.remove()
    return torch.stack(effects).view(len(held), -1)


@torch.no_grad()
def limit(model: prisma.HookedViT, streams: list[Tensor], pos: slice) -> None:
    """Run the block passes alone that the sweep cannot do without."""
    n_layers, n_heads = model.spec.n_layers, model.spec.blocks[0].attn.n_heads
    for layer in range(n_layers):
        x = streams[layer].repeat(n_heads, 1, 1)
        start = layer
        if pos.stop is not None and layer < n_layers - 1:  # only the class token changes in this block
            row = model.blocks[layer](x, leading=1)
            x = torch.cat([row, streams[layer + 1][:, 1:].repeat(n_heads, 1, 1)], 1)
            start = layer + 1
        for block in model.blocks[start : n_layers - 1]:
            x = block(x)
        model.unembed(model.blocks[-1](x, leading=1))


def measure(name: str, where: str, options: Options) -> Iterator[Row]:
    upstream = timm.create_model(name).eval().to(options.device)
    draw(upstream)
    model = prisma.adapt(upstream, copy=False)
    torch.manual_seed(0)
    image, other = torch.randn(2, 1, 3, *model.spec.image_size, device=options.device).unbind(0)
    pos = slice(0, 1) if where == "cls" else slice(None)
    _, cache = model.run_with_cache(image, names="resid_pre")
    streams = [cache["resid_pre", layer] for layer in range(model.spec.n_layers)]
    chosen = "cls" if where == "cls" else None
    sides: dict[str, Side] = {
        "loop": lambda: loop(upstream, image, other, pos),
        "limit": lambda: limit(model, streams, pos),
        "ours": lambda: patch_heads(model, image, other, METRIC, pos=chosen, batch_size=BATCH, progress=False).values,
    }
    start = once(sides["loop"], options)
    by_hand, effects = loop(upstream, image, other, pos), sides["ours"]()[..., 0]
    error = (
        f"largest difference {((effects - by_hand).abs().max() / by_hand.abs().max()).item():.0e} of the largest effect"
    )
    sides["limit"]()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(max(2, round(options.budget / start))):
        for side in ("ours", "limit", "loop", "limit", "ours"):
            times[side].append(once(sides[side], options))
    seconds = {side: statistics.median(values) for side, values in times.items()}
    what = f"all heads patched, {'class token' if where == 'cls' else 'all tokens'}"
    for title, side, note in (
        ("hooks on timm, a pass for each", "loop", error),
        ("the passes that must be made", "limit", ""),
    ):
        ratio, runs = round(seconds["ours"] / seconds[side], 3), len(times[side])
        yield Row("sweeps", name, 1, what, title, ratio, round(seconds["ours"], 3), runs, note)


def rows(options: Options) -> Iterator[Row]:
    for name in options.models:
        for where in ("cls", "all"):
            yield from measure(name, where, options)
