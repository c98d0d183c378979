"""The list of hook points that canonical models can have is theirs, no name more and no name less."""

from __future__ import annotations

import re

import torch

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
from prisma_core.spec.layout import TokenLayout
from prisma_core.transformer import HookedText, HookedViT
from prisma_core.transformer.names import NAMES

NORM = NormSpec(eps=1e-6)
ATTENTION = AttentionSpec(n_heads=1, n_kv_heads=1, d_head=2, scale=1, qk_norm=NORM, inner_norm=NORM)
MLP = MlpSpec(d_mlp=1, act="gelu", gated=True, inner_norm=NORM, pre_norm=NORM)
BLOCK = BlockSpec(attn=ATTENTION, mlp=MLP, ln1=NORM, ln2=NORM)


def models_with_every_part() -> list[HookedViT | HookedText]:
    spec = ModelSpec(
        d_model=2,
        image_size=(1, 1),
        embed=EmbedSpec(patch=(1, 1), norm=NORM),
        layout=TokenLayout(cls=1, distillation=1, rows=1, columns=1),
        blocks=(BLOCK, BLOCK.model_copy(update={"n_parallel": 2})),
        rope=RopeSpec(layout="half"),
        ln_pre=NORM,
        ln_final=NORM,
        pool=PoolSpec(kind="attention", attn=ATTENTION, mlp=MLP, norm=NORM, latent_norm=NORM),
        ln_pool=NORM,
        d_pool=2,
        n_classes=1,
    )
    two_heads = spec.model_copy(update={"pool": PoolSpec(kind="token"), "ln_pool": None, "n_heads_out": 2})
    text = TextSpec(
        d_model=2,
        n_vocab=1,
        n_ctx=1,
        causal=True,
        blocks=(BLOCK,),
        pool=TextPoolSpec(kind="last"),
        n_classes=1,
        head=MLP,
    )
    with torch.device("meta"):
        return [HookedViT(spec), HookedViT(two_heads), HookedText(text)]


def without_numbers(names: object) -> set[str]:
    return {re.sub(r"(?<=\.)\d+(?=\.)", "{l}", str(name)) for name in names}  # type: ignore[attr-defined]


def test_the_list_is_what_models_with_every_part_have() -> None:
    assert set().union(*(without_numbers(model.hook_points()) for model in models_with_every_part())) == NAMES


def test_no_variant_has_a_name_that_is_not_listed(variant: HookedViT) -> None:
    """A new part of the transformer has its hook points in the list: tables for several models may name them."""
    assert without_numbers(variant.hook_points()) <= NAMES
