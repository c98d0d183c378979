"""Time the hooked model against timm and against hooks written by hand on timm.

    python benchmarks/speed.py --json figures.json

Every figure is a ratio of medians: the two sides run in turn, in one process, on the same input and weights, and which
one goes first alternates.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import prisma_core as prisma

Run = Callable[[], object]
console = Console()


def hand_written_residuals(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Keep the residual stream after every block, with forward hooks."""
    kept: dict[str, Tensor] = {}
    handles = [
        block.register_forward_hook(lambda m, args, out, name=f"blocks.{i}": kept.__setitem__(name, out))
        for i, block in enumerate(model.blocks)
    ]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def hand_written_everything(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Keep every tensor that a full cache keeps, as a careful user would with forward hooks on timm.

    Scores and patterns do not exist in the fused kernel, so attention is computed step by step, as in a full cache;
    norm scales are computed beside the norms.
    """
    kept: dict[str, Tensor] = {}
    handles: list[Any] = []
    forwards: list[nn.Module] = []

    def keep(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_hook(lambda m, args, out: kept.__setitem__(name, out)))

    def keep_norm(module: nn.LayerNorm, name: str) -> None:
        def hook(m: nn.LayerNorm, args: tuple[Tensor, ...], out: Tensor) -> None:
            centred = args[0] - args[0].mean(-1, keepdim=True)
            kept[f"{name}.scale"] = (centred.pow(2).mean(-1, keepdim=True) + m.eps).sqrt()
            kept[f"{name}.normalized"] = out

        handles.append(module.register_forward_hook(hook))

    def explicit(attn: nn.Module, name: str) -> Callable[..., Tensor]:
        def forward(x: Tensor, **ignored: object) -> Tensor:
            batch, tokens, _ = x.shape
            qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            scores = (q * attn.scale) @ k.transpose(-2, -1)
            pattern = scores.softmax(-1)
            z = (pattern @ v).transpose(1, 2)
            kept.update(
                {f"{name}.q": q, f"{name}.k": k, f"{name}.v": v, f"{name}.scores": scores, f"{name}.pattern": pattern}
            )
            kept[f"{name}.z"] = z
            return attn.proj(z.reshape(batch, tokens, -1))

        return forward

    keep(model.patch_embed, "embed")
    kept["pos_embed"] = model.pos_embed.expand(image.shape[0], -1, -1).clone()
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        handles.append(block.register_forward_pre_hook(lambda m, args, n=name: kept.__setitem__(f"{n}.pre", args[0])))
        handles.append(
            block.norm2.register_forward_pre_hook(lambda m, args, n=name: kept.__setitem__(f"{n}.mid", args[0]))
        )
        keep_norm(block.norm1, f"{name}.norm1")
        keep_norm(block.norm2, f"{name}.norm2")
        block.attn.forward = explicit(block.attn, f"{name}.attn")
        forwards.append(block.attn)
        keep(block.attn, f"{name}.attn_out")
        keep(block.mlp.fc1, f"{name}.mlp.pre")
        keep(block.mlp.act, f"{name}.mlp.post")
        keep(block.mlp, f"{name}.mlp_out")
        keep(block, f"{name}.post")
    keep_norm(model.norm, "norm")
    keep(model.head, "logits")
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
        for module in forwards:
            del module.forward
    return kept


def cached_by_scope(model: nn.Module, hooked: prisma.HookedViT, image: Tensor) -> object:
    """Run a compiled model with the whole residual stream cached."""
    with hooked.caching("resid_post") as cache:
        model(image)
    return cache


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(one: Run, other: Run, budget: float, device: torch.device) -> tuple[float, float, int]:
    """Return the ratio of the medians of two sides run in turn, the median seconds of the first, and how many runs."""
    for side in (one, other, one, other):  # warm-up, and compilation where there is any
        side()
    start = time.perf_counter()
    one(), other()
    synchronise(device)
    repeats = min(101, max(11, round(budget / (time.perf_counter() - start))))
    times: dict[Run, list[float]] = {one: [], other: []}
    for index in range(repeats):
        for side in (one, other) if index % 2 else (other, one):
            synchronise(device)
            start = time.perf_counter()
            side()
            synchronise(device)
            times[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(values) for side, values in times.items()}
    return medians[one] / medians[other], medians[one], repeats


def compare(
    name: str, batch: int, budget: float, device: torch.device, *, compiled: bool, only: list[str] | None = None
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    upstream = timm.create_model(name).eval().to(device)
    hooked = prisma.adapt(upstream, copy=False)
    image = torch.randn(batch, 3, *hooked.spec.image_size, device=device)
    sides: dict[str, Run] = {
        "timm": lambda: upstream(image),
        "hooked": lambda: hooked(image),
        "cache residuals": lambda: hooked.run_with_cache(image, names="resid_post"),
        "by hand, residuals": lambda: hand_written_residuals(upstream, image),
        "cache everything": lambda: hooked.run_with_cache(image),
        "by hand, everything": lambda: hand_written_everything(upstream, image),
    }
    pairs = [
        ("hooked", "timm"),
        ("cache residuals", "timm"),
        ("by hand, residuals", "timm"),
        ("cache everything", "by hand, everything"),
    ]
    if compiled:
        fast = torch.compile(hooked, fullgraph=True)
        sides["compiled"] = lambda: fast(image)
        sides["compiled, cache residuals"] = lambda: cached_by_scope(fast, hooked, image)
        pairs += [("compiled", "timm"), ("compiled, cache residuals", "timm")]
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for one, other in (pair for pair in pairs if only is None or pair[0] in only):
            value, seconds, repeats = ratio(sides[one], sides[other], budget, device)
            row = {"model": name, "batch": batch, "what": one, "against": other}
            rows.append({**row, "ratio": round(value, 3), "seconds": round(seconds, 4), "runs": repeats})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_base_patch32_224", "vit_base_patch16_224"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--budget", type=float, default=15, help="seconds for each pair (default: 15; 11 runs at least)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled rows out")
    parser.add_argument("--only", nargs="+", metavar="WHAT", help="only these rows, such as 'cache residuals'")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    cases = [(name, batch) for name in options.models for batch in options.batches]
    for name, batch in track(cases, "timing", console=console):
        rows += compare(name, batch, options.budget, device, compiled=not options.no_compile, only=options.only)
    machine = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    )
    title = f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}"
    columns = ("model", "batch", "what", "against", "ratio", "seconds", "runs")
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"conditions": title, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
