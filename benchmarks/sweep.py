"""Time a sweep over all (layer, head) of one image against hand-written hooks on timm, and against its limit.

All three sides run in turn in one process, with the same weights:

- the loop: timm's own model and one forward hook, a whole pass for each head;
- the limit: the block passes that must be made, bare: from the patched layer on, variants batched, with the tokens that
  still matter behind the last attention, and with the class token patched in the patched block too; no hooks;
- ours: ``prisma_patch.patch_heads``.

    OMP_NUM_THREADS=2 python benchmarks/sweep.py --models vit_base_patch32_224 vit_base_patch16_224
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from prisma_patch import logit_difference, patch_heads
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import prisma_core as prisma

console = Console(soft_wrap=True)
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


def measure(name: str, where: str, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    torch.manual_seed(0)
    upstream = timm.create_model(name).eval()
    for parameter in upstream.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    model = prisma.adapt(upstream, copy=False)
    image, other = torch.randn(2, 1, 3, *model.spec.image_size).unbind(0)
    pos = slice(0, 1) if where == "cls" else slice(None)
    _, cache = model.run_with_cache(image, names="resid_pre")
    streams = [cache["resid_pre", layer] for layer in range(model.spec.n_layers)]
    chosen = "cls" if where == "cls" else None
    sides: dict[str, Callable[[], Any]] = {
        "loop": lambda: loop(upstream, image, other, pos),
        "limit": lambda: limit(model, streams, pos),
        "ours": lambda: patch_heads(model, image, other, METRIC, pos=chosen, batch_size=BATCH, progress=False).values,
    }
    by_hand, effects = sides["loop"](), sides["ours"]()[..., 0]
    sides["limit"]()
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in ("ours", "limit", "loop", "limit", "ours"):
            start = clock()
            sides[side]()
            times[side].append(clock() - start)
    seconds = {side: statistics.median(values) for side, values in times.items()}
    return {
        "model": name,
        "tokens": where,
        **{side: round(value, 3) for side, value in seconds.items()},
        "loop / ours": round(seconds["loop"] / seconds["ours"], 2),
        "ours / limit": round(seconds["ours"] / seconds["limit"], 3),
        "error": f"{((effects - by_hand).abs().max() / by_hand.abs().max()).item():.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_base_patch32_224", "vit_base_patch16_224"])
    parser.add_argument("--tokens", nargs="+", choices=["cls", "all"], default=["cls", "all"])
    parser.add_argument("--repeats", type=int, default=3, help="runs of the loop; twice as many of the other two")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of this process, for machines that are not quiet"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    cases = [(name, where) for name in options.models for where in options.tokens]
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    rows = [measure(*case, options.repeats, clock) for case in track(cases, "timing", console=console)]
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    title = f"{torch.get_num_threads()} threads, {versions}; seconds of {options.clock} time"
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"conditions": title, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
