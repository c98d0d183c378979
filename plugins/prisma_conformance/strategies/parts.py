"""Parts of specs: norms, MLPs, attention, blocks, embeddings, rotary positions, pooling."""

from __future__ import annotations

from typing import Any, TypeVar

from hypothesis import strategies as st

from prisma_core.plugin import (
    AttentionSpec,
    BlockSpec,
    EmbedSpec,
    Interpolation,
    MlpSpec,
    NormSpec,
    PoolSpec,
    RopeGrid,
    RopeSpec,
    TokenLayout,
)

T = TypeVar("T")

SEEDS = st.integers(0, 2**32 - 1)
ACTIVATIONS = st.sampled_from(["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"])
SMALL = st.integers(1, 3)
EPS = st.floats(1e-4, 1e-1)


def or_none(strategy: st.SearchStrategy[T]) -> st.SearchStrategy[T | None]:
    return st.none() | strategy


NORMS = st.builds(NormSpec, kind=st.sampled_from(["ln", "rms"]), eps=EPS)
MLPS = st.builds(
    MlpSpec,
    d_mlp=st.integers(1, 9),
    act=ACTIVATIONS,
    gated=st.booleans(),
    inner_norm=or_none(NORMS),
    pre_norm=or_none(NORMS),
)
INTERPOLATIONS = st.builds(
    Interpolation,
    mode=st.sampled_from(["bicubic", "bilinear"]),
    antialias=st.booleans(),
    square=st.booleans(),
    in_float32=st.booleans(),
    rounded=st.sampled_from(["", "prefix", "native"]),
)


@st.composite
def attentions(
    draw: st.DrawFn, *, bias: bool = True, grouped: bool = True, d_head: int | None = None, n_heads: int | None = None
) -> AttentionSpec:
    heads = n_heads or draw(st.sampled_from([1, 2, 3, 4]))
    return AttentionSpec(
        n_heads=heads,
        n_kv_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])) if grouped else heads,
        d_head=d_head or draw(st.integers(1, 6)),
        scale=draw(st.floats(0.05, 1.0)),
        qk_norm=draw(or_none(NORMS)),
        qk_norm_over=draw(st.sampled_from(["head", "all_heads"])),
        inner_norm=draw(or_none(NORMS)),
        bias=bias and draw(st.booleans()),
    )


@st.composite
def blocks(draw: st.DrawFn, attn: AttentionSpec, *, post: bool) -> BlockSpec:
    kind = draw(st.sampled_from(["pre", "res_post", "parallel", *(["post"] if post else [])]))
    mlp = draw(MLPS if kind in ("post", "parallel") else or_none(MLPS))
    return BlockSpec(
        kind=kind,
        n_parallel=draw(st.sampled_from([1, 1, 2])) if kind == "pre" else 1,
        attn=attn,
        mlp=mlp,
        ln1=draw(or_none(NORMS)),
        ln2=draw(or_none(NORMS)) if mlp is not None and kind != "parallel" else None,
        attn_scale=draw(st.booleans()),
        mlp_scale=draw(st.booleans()) and mlp is not None,
    )


@st.composite
def stacks(draw: st.DrawFn, *, post: bool = False, **attention: Any) -> tuple[BlockSpec, ...]:
    """One to three blocks, alike or each its own."""
    attn = attentions(**attention)
    layers = draw(SMALL)
    if draw(st.booleans()):
        return (draw(blocks(draw(attn), post=post)),) * layers
    return tuple(draw(blocks(draw(attn), post=post)) for _ in range(layers))


@st.composite
def layouts(draw: st.DrawFn, *, video: bool) -> TokenLayout:
    return TokenLayout(
        cls=draw(st.integers(0, 1)),
        distillation=draw(st.sampled_from([0, 0, 1])),
        registers=draw(st.integers(0, 2)),
        frames=draw(SMALL) if video else 1,
        rows=draw(SMALL),
        columns=draw(SMALL),
    )


@st.composite
def embeds(draw: st.DrawFn, patch: tuple[int, int], tubelet: int | None) -> EmbedSpec:
    pos = draw(st.booleans())
    return EmbedSpec(
        patch=patch,
        tubelet=tubelet,
        in_channels=draw(SMALL),
        by_token=draw(st.booleans()),
        norm=draw(or_none(NORMS)),
        pos=pos,
        pos_factorized=pos and tubelet is None and draw(st.booleans()),
        interpolation=draw(or_none(INTERPOLATIONS)) if tubelet is None else None,
    )


@st.composite
def ropes(draw: st.DrawFn) -> RopeSpec:
    per_layer, per_head = draw(st.booleans()), draw(st.booleans())
    grid = RopeGrid(
        coordinates=draw(st.sampled_from(["index", "centred", "radians"])),
        waves=(draw(st.floats(0.5, 9.0)),),
        column_first=draw(st.booleans()),
        normalize=draw(st.sampled_from(["separate", "min", "max"])),
    )
    return RopeSpec(
        layout=draw(st.sampled_from(["interleaved", "half"])),
        per_layer=per_layer,
        per_head=per_head,
        grid=draw(st.sampled_from([None, grid])) if not (per_layer or per_head) else None,
    )


@st.composite
def pools(draw: st.DrawFn, kind: Any) -> PoolSpec:
    with_prefix = kind != "patches" and draw(st.booleans())
    if kind != "attention":
        return PoolSpec(kind=kind, with_prefix=with_prefix)
    heads = draw(SMALL)
    attn = AttentionSpec(
        n_heads=heads,
        n_kv_heads=heads,
        d_head=draw(st.integers(1, 5)),
        scale=draw(st.floats(0.05, 1.0)),
        qk_norm=draw(or_none(NORMS)),
    )
    mlp = draw(or_none(MLPS))
    return PoolSpec(
        kind=kind,
        with_prefix=with_prefix,
        attn=attn,
        n_latents=draw(SMALL),
        d_latent=draw(or_none(st.integers(1, 9))),
        latent_norm=draw(or_none(NORMS)),
        latents=draw(st.sampled_from(["first", "mean"])),
        mlp=mlp,
        norm=draw(or_none(NORMS)) if mlp is not None else None,
    )
