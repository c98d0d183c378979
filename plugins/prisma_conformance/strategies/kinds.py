"""Specs of canonical transformers, tiny and of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from hypothesis import strategies as st

from prisma_conformance.strategies.parts import MLPS, NORMS, SMALL, embeds, layouts, or_none, pools, ropes, stacks
from prisma_core.plugin import (
    AnySpec,
    DualSpec,
    ModelSpec,
    TextPoolSpec,
    TextSpec,
)

Kind = Literal["vision", "text", "dual"]


def specs(kinds: Sequence[Kind] = ("vision", "text", "dual")) -> st.SearchStrategy[AnySpec]:
    """Specs of canonical transformers, tiny and of every kind: each is valid, builds and runs.

    Args:
        kinds: the kinds to draw from.

    >>> specs(["vision"]).example().kind
    'vision'
    """
    by_kind: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "vision": vision_specs,
        "text": text_specs,
        "dual": dual_specs,
    }
    return st.one_of(*(by_kind[kind]() for kind in kinds))


@st.composite
def vision_specs(draw: st.DrawFn, *, video: bool | None = None, vector: bool = False) -> ModelSpec:
    """Specs of vision transformers, of images and of videos.

    Args:
        video: True for videos alone, False for images alone.
        vector: True for pooling to one vector alone.
    """
    tubelet = draw(or_none(SMALL)) if video is None else draw(SMALL) if video else None
    d_model = draw(st.integers(2, 12))
    patch, layout = (draw(SMALL), draw(SMALL)), draw(layouts(video=tubelet is not None))
    embed, rope = draw(embeds(patch, tubelet)), draw(or_none(ropes()))
    attention: dict[str, Any] = {"bias": embed.interpolation is None}  # a bias is of one size
    if rope is not None:  # one table for all blocks
        attention |= {"d_head": 4, "n_heads": draw(SMALL), "grouped": not rope.per_head}
    kinds = ["avg", "attention"] if vector else ["none", "patches", "avg", "attention"]
    kinds += ["token", "token_and_avg"] if layout.n_prefix else []
    pool = draw(pools(draw(st.sampled_from(kinds))))
    two_heads = pool.kind == "token" and layout.cls == 1 and layout.distillation == 1 and draw(st.booleans())
    return ModelSpec(
        d_model=d_model,
        image_size=(layout.rows * patch[0], layout.columns * patch[1]),
        embed=embed,
        layout=layout,
        blocks=draw(stacks(**attention)),
        rope=rope,
        ln_pre=draw(or_none(NORMS)),
        ln_final=draw(or_none(NORMS)),
        pool=pool,
        ln_pool=None if two_heads else draw(or_none(NORMS)),
        d_pool=2 * d_model if pool.kind == "token_and_avg" else d_model,
        n_classes=draw(st.integers(1, 7)) if two_heads else draw(or_none(st.integers(1, 7))),
        n_heads_out=2 if two_heads else 1,
    )


@st.composite
def text_specs(draw: st.DrawFn, *, vector: bool = False) -> TextSpec:
    """Specs of text transformers.

    Args:
        vector: True for pooling to one vector alone.
    """
    n_vocab, suffix = draw(st.integers(5, 20)), draw(st.booleans())
    pad_id = draw(or_none(st.integers(0, n_vocab - 1)))
    padded = pad_id is not None and not suffix
    kinds = ["argmax", "eos", "first", "last", *(["avg"] if padded else []), *([] if vector else ["none"])]
    kind = draw(st.sampled_from(kinds))
    n_classes = draw(or_none(st.integers(1, 7)))
    other = st.integers(0, n_vocab - 1).filter(lambda token: token != pad_id)
    return TextSpec(
        d_model=draw(st.integers(2, 12)),
        n_vocab=n_vocab,
        n_ctx=draw(st.integers(2, 6)),
        causal=draw(st.booleans()),
        suffix=suffix,
        pad_id=pad_id,
        pad_lag=draw(st.integers(0, 1)) if suffix and pad_id is not None else 0,
        pos_by_text=padded and draw(st.booleans()),
        blocks=draw(stacks(post=True, bias=False)),
        ln_pre=draw(or_none(NORMS)),
        ln_final=draw(or_none(NORMS)),
        pool=TextPoolSpec(kind=kind, eos_id=draw(other) if kind == "eos" else None),
        ln_pool=draw(or_none(NORMS)),
        n_classes=n_classes,
        head=draw(or_none(MLPS)) if n_classes is not None else None,
    )


@st.composite
def dual_specs(draw: st.DrawFn) -> DualSpec:
    """Specs of dual encoders: a vision and a text tower with outputs of one width."""
    vision, text = draw(vision_specs(vector=True)), draw(text_specs(vector=True))
    width = {"n_classes": draw(st.integers(2, 7))}
    return DualSpec(
        vision=vision.model_copy(update=width), text=text.model_copy(update=width), logit_bias=draw(st.booleans())
    )
