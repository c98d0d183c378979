"""Tiny canonical models whose every parameter is random and every size its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from prisma_core import HookedModel, HookedViT, ModelSpec
from prisma_core.spec import (
    AttentionSpec,
    Interpolation,
    NormSpec,
    RopeSpec,
)

LN, RMS = NormSpec(eps=1e-3), NormSpec(kind="rms", eps=1e-2)
EXACT = {"rtol": 1e-11, "atol": 1e-11}
LABELS = ("cat", "dog", "emu", "fox", "gnu", "hen", "ibex")


def build(
    *,
    norm: NormSpec | None = LN,
    kind: str = "pre",
    n_parallel: int = 1,
    ln_pre: bool = False,
    ln_final: bool = True,
    ln_pool: bool = False,
    pos: bool = True,
    factorized: bool = False,
    pool: str = "token",
    with_prefix: bool = False,
    scale: bool = False,
    cls: int = 1,
    distillation: int = 0,
    registers: int = 0,
    mlp: bool = True,
    gated: bool = False,
    kv_heads: int = 4,
    qk_norm: bool = False,
    inner_norm: bool = False,
    attn_bias: bool = False,
    rope: bool = False,
    interpolation: bool = False,
    n_classes: int | None = 7,
    layers: int = 2,
    seed: int = 0,
) -> HookedViT:
    final, inner = norm or LN, LN if inner_norm else None
    mlps = {"d_mlp": 20, "gated": gated} if mlp else {"mlp": None}
    spec = ModelSpec.plain(
        d_model=18,
        layers=layers,
        heads=4,
        norm=norm,
        kind=kind,
        n_parallel=n_parallel,
        attn_scale=scale,
        mlp_scale=scale and mlp,
        n_kv_heads=kv_heads,
        d_head=6,
        scale=0.3,
        qk_norm=LN if qk_norm else None,
        inner_norm=inner,
        bias=attn_bias,
        pos=pos,
        pos_factorized=factorized,
        interpolation=Interpolation() if interpolation else None,
        cls=cls,
        distillation=distillation,
        registers=registers,
        rope=RopeSpec(layout="half") if rope else None,
        ln_pre=final if ln_pre else None,
        ln_final=final if ln_final else None,
        ln_pool=final if ln_pool else None,
        pool={"kind": pool, "with_prefix": with_prefix, "attn": attn_pool(pool)},
        d_pool=36 if pool == "token_and_avg" else 18,
        n_classes=n_classes,
        n_heads_out=2 if distillation else 1,
        **mlps,
    )
    torch.manual_seed(seed)
    model = HookedViT(spec)
    for parameter in model.parameters():
        # Without norms nothing bounds the stream, and softmaxes would saturate.
        torch.nn.init.normal_(parameter, std=0.15 if norm is None else 0.5)
    model.labels = LABELS if n_classes == len(LABELS) else None
    return model.eval()


def attn_pool(kind: str) -> AttentionSpec | None:
    return AttentionSpec(n_heads=3, n_kv_heads=3, d_head=6, scale=0.4) if kind == "attention" else None


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale, registers": {"scale": True, "registers": 2},
    "ln_pre": {"ln_pre": True},
    "no positions": {"pos": False},
    "mean of patches": {"pool": "avg", "registers": 1},
    "mean of all, both norms": {"pool": "avg", "with_prefix": True, "ln_pool": True},
    "ln after pool": {"pool": "avg", "ln_final": False, "ln_pool": True, "cls": 0},
    "all tokens": {"pool": "none", "ln_pool": True},
    "rms, glu": {"norm": RMS, "gated": True},
    "no norms at all": {"norm": None, "ln_final": False},
    "res_post": {"kind": "res_post", "scale": True},
    "res_post without norm": {"kind": "res_post", "norm": None},
    "parallel": {"kind": "parallel", "scale": True, "gated": True},
    "side by side": {"n_parallel": 2, "scale": True},
    "attention only, grouped": {"mlp": False, "kv_heads": 2},
    "two heads": {"distillation": 1},
    "inner norms": {"inner_norm": True},
    "rope, qk_norm, bias": {"rope": True, "qk_norm": True, "attn_bias": True},
}


def close(left: torch.Tensor, right: torch.Tensor) -> None:
    """Assert that float64 numbers are equal up to rounding."""
    torch.testing.assert_close(left, right, **EXACT)


@pytest.fixture
def in_float64() -> Iterator[None]:
    """Whatever a test makes is float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def make(in_float64: None) -> Callable[..., HookedViT]:
    """Build a model of these facts."""
    return build


@pytest.fixture
def vit(in_float64: None) -> HookedViT:
    """A plain model with layer scale and registers."""
    return build(scale=True, registers=2)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request: pytest.FixtureRequest, in_float64: None) -> HookedViT:
    """Each kind of model in turn."""
    return build(**request.param)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(3, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def flops(model: HookedModel, x: Tensor, **how: Any) -> int:
    """Return the operations of a plain pass, or of one that is cached ``how``."""
    with FlopCounterMode(display=False) as counter:
        model.run_with_cache(x, **how) if how else model(x)
    return counter.get_total_flops()
