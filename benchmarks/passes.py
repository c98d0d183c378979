"""Passes of the hooked model: plain, with caches of several sizes, with gradients, compiled.

Each is timed against timm's own pass, or against forward hooks on timm that a careful user would write to keep the same
tensors. The parameters are drawn, and both sides share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import timm
import torch
from timing import Options, Row, Side, draw, free_bytes, timed
from torch import Tensor, nn

import prisma_core as prisma

MODELS = ("vit_tiny_patch16_224", "vit_base_patch32_224", "vit_base_patch16_224", "vit_large_patch14_clip_224")


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


def hand_written_everything(model: nn.Module, image: Tensor, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Keep every tensor that a full cache keeps, as a careful user would with forward hooks on timm.

    With ``layers``, those of these blocks alone.

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

    if layers is None:
        keep(model.patch_embed, "embed")
        kept["pos_embed"] = model.pos_embed.expand(image.shape[0], -1, -1).clone()
        keep_norm(model.norm, "norm")
        keep(model.head, "logits")
    for i in range(len(model.blocks)) if layers is None else layers:
        block, name = model.blocks[i], f"blocks.{i}"
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
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
        for module in forwards:
            del module.forward
    return kept


def hand_written_gradients(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Keep the gradient of the first logit with respect to the residual stream after every block."""
    kept: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, args, out: kept.append(out)) for block in model.blocks]
    try:
        with torch.enable_grad():
            logits = model(image)
            return list(torch.autograd.grad(logits[:, 0].sum(), kept))
    finally:
        for handle in handles:
            handle.remove()


def cached_by_scope(model: nn.Module, hooked: prisma.HookedViT, image: Tensor) -> object:
    """Run a compiled model with the whole residual stream cached."""
    with hooked.caching("resid_post") as cache:
        model(image)
    return cache


def sides(upstream: Any, hooked: prisma.HookedViT, image: Tensor) -> dict[str, Side]:
    """Return everything that is timed, by the name it has in the table."""
    middle = len(upstream.blocks) // 2
    torch.compiler.reset()  # each model is compiled anew, and torch keeps eight
    fast = torch.compile(hooked, fullgraph=True)
    return {
        "timm": lambda: upstream(image),
        "plain pass": lambda: hooked(image),
        "cache of the residual stream": lambda: hooked.run_with_cache(image, names="resid_post"),
        "hooks for the residual stream": lambda: hand_written_residuals(upstream, image),
        "cache of the class token's patterns": lambda: hooked.run_with_cache(image, names="pattern", pos="cls"),
        "cache of one block": lambda: hooked.run_with_cache(image, names=lambda name: f"blocks.{middle}." in name),
        "hooks for one block": lambda: hand_written_everything(upstream, image, [middle]),
        "full cache": lambda: hooked.run_with_cache(image),
        "hooks for everything": lambda: hand_written_everything(upstream, image),
        "gradients of the residual stream": lambda: hooked.run_with_cache(
            image, names="resid_post", loss=lambda logits: logits[:, 0].sum()
        ),
        "hooks for gradients": lambda: hand_written_gradients(upstream, image),
        "compiled": lambda: fast(image),
        "compiled, cache of the residual stream": lambda: cached_by_scope(fast, hooked, image),
    }


PAIRS = (
    ("plain pass", "timm"),
    ("cache of the residual stream", "timm"),
    ("hooks for the residual stream", "timm"),
    ("cache of the class token's patterns", "timm"),
    ("cache of one block", "hooks for one block"),
    ("full cache", "hooks for everything"),
    ("full cache", "timm"),
    ("gradients of the residual stream", "hooks for gradients"),
    ("compiled", "timm"),
    ("compiled, cache of the residual stream", "timm"),
)


def full_cache_bytes(upstream: Any, batch: int) -> int:
    """Return the bytes that the hooks for everything keep, from one image."""
    with torch.no_grad():
        image = torch.zeros(1, *upstream.default_cfg["input_size"], device=next(upstream.parameters()).device)
        kept = hand_written_everything(upstream, image)
    return batch * sum(tensor.nbytes for tensor in kept.values())


def rows(options: Options) -> Iterator[Row]:
    for name in options.models:
        upstream = timm.create_model(name).eval().to(options.device)
        draw(upstream)
        hooked = prisma.adapt(upstream, copy=False)
        for batch in options.batches:
            image = torch.randn(batch, 3, *hooked.spec.image_size, device=options.device)
            # Both sides' caches may be alive for a moment, and the kernels want room too; a graph holds as much.
            too_large = 2.5 * (needed := full_cache_bytes(upstream, batch)) > free_bytes(options.device)
            known = sides(upstream, hooked, image)
            for what, other in PAIRS:
                row = Row("passes", name, batch, what, other)
                if "compiled" in what and not options.compiled:
                    continue
                if too_large and what in ("full cache", "gradients of the residual stream"):
                    yield Row(
                        "passes", name, batch, what, other, note=f"holds {needed / 2**30:.0f} GiB twice: left out"
                    )
                    continue
                with torch.set_grad_enabled("gradients" in what):
                    yield timed(row, known[what], known[other], options)
