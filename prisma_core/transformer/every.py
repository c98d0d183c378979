"""The names that hook points have in some canonical model, read off models that have every part there is."""

from __future__ import annotations

import re
from functools import cache

import torch

from prisma_core.hooks.tokens import TokenLayout
from prisma_core.model import ZooModel
from prisma_core.spec import (
    AttentionSpec,
    BlockSpec,
    EmbedSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    PoolSpec,
    RopeSpec,
    TextPoolSpec,
    TextSpec,
)
from prisma_core.transformer.text import HookedText
from prisma_core.transformer.vit import HookedViT


def lacking(model: ZooModel) -> frozenset[str]:
    """Return the hook points that a canonical model might have, had it every part; ``{l}`` for each number."""
    return frozenset(prefix + name for prefix in model.towers() for name in _every())


@cache
def _every() -> frozenset[str]:
    norm = NormSpec(eps=1e-6)
    attn = AttentionSpec(n_heads=1, n_kv_heads=1, d_head=2, scale=1, qk_norm=norm, inner_norm=norm)
    mlp = MlpSpec(d_mlp=1, act="gelu", gated=True, inner_norm=norm, pre_norm=norm)
    block = BlockSpec(attn=attn, mlp=mlp, ln1=norm, ln2=norm)
    by_attention = PoolSpec(kind="attention", attn=attn, mlp=mlp, norm=norm, latent_norm=norm)
    spec = ModelSpec(
        d_model=2,
        image_size=(1, 1),
        embed=EmbedSpec(patch=(1, 1), norm=norm),
        layout=TokenLayout(cls=1, distillation=1, rows=1, columns=1),
        blocks=(block, block.model_copy(update={"n_parallel": 2})),
        rope=RopeSpec(layout="half"),
        ln_pre=norm,
        ln_final=norm,
        pool=by_attention,
        ln_pool=norm,
        d_pool=2,
        n_classes=1,
    )
    two_heads = spec.model_copy(update={"pool": PoolSpec(kind="token"), "ln_pool": None, "n_heads_out": 2})
    text = TextSpec(
        d_model=2,
        n_vocab=1,
        n_ctx=1,
        causal=True,
        blocks=(block,),
        pool=TextPoolSpec(kind="last"),
        n_classes=1,
        head=mlp,
    )
    with torch.device("meta"):
        models = (HookedViT(spec), HookedViT(two_heads), HookedText(text))
    points = [name for model in models for name in model.hook_points()]
    return frozenset(re.sub(r"(?<=\.)\d+(?=\.)", "{l}", name) for name in points)
