"""The names of all hook points that a canonical model can have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prisma_core.model import ZooModel

NORM = ("hook_scale", "hook_normalized")
ATTENTION = ("hook_q", "hook_k", "hook_v", "hook_attn_scores", "hook_pattern", "hook_z")
IN_BLOCKS = ("hook_rot_q", "hook_rot_k", "hook_result")
MLP = ("hook_pre", "hook_pre_linear", "hook_mid", "hook_post")
STREAM = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"),
    *("hook_q_input", "hook_k_input", "hook_v_input"),
)
MODEL = (
    *("hook_embed", "hook_pos_embed", "hook_full_embed", "hook_ln_pre", "hook_ln_final"),
    *("pool.hook_attn_out", "pool.hook_mlp_out", "hook_pooled", "hook_pooled_dist", "hook_logits"),
)


def _of(parts: Iterable[str], names: Iterable[str]) -> Iterator[str]:
    points = tuple(names)
    return (f"{part}.{point}" for part in parts for point in points)


def _attention(part: str, norm: str) -> Iterator[str]:
    yield from _of([part], ATTENTION)
    yield from _of([f"{part}.q_norm", f"{part}.k_norm", f"{part}.{norm}"], NORM)


def _mlp(part: str) -> Iterator[str]:
    yield from _of([part], MLP)
    yield from _of([f"{part}.ln", f"{part}.pre_norm"], NORM)


_BLOCK = "blocks.{l}"
_SIDES = ("", ".{l}")  # blocks of several branches side by side have each part once a branch
NAMES = frozenset(
    [
        *MODEL,
        *_of(["embed.norm", "ln_pre", "ln_final", "ln_pool", "pool.ln"], NORM),
        *_attention("pool.attn", "ln_latent"),
        *_mlp("pool.mlp"),
        *_mlp("head_mlp"),
        *_of([_BLOCK], STREAM),
        *_of([f"{_BLOCK}.ln{n}{side}" for n in (1, 2) for side in _SIDES], NORM),
        *(name for side in _SIDES for name in _attention(f"{_BLOCK}.attn{side}", "ln")),
        *_of([f"{_BLOCK}.attn{side}" for side in _SIDES], IN_BLOCKS),
        *(name for side in _SIDES for name in _mlp(f"{_BLOCK}.mlp{side}")),
    ]
)


def optional_hook_names(model: ZooModel) -> frozenset[str]:
    """The hook points that a model like this could have, had it every part; ``{l}`` for each number."""
    return frozenset(prefix + name for prefix in model.towers() for name in NAMES)
