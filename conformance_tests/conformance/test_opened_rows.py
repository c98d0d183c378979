"""Rows of canonical hook maps that open upstream's fused kernel are compared, or refused in words."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
from prisma_conformance import CHECKS, Case
from prisma_conformance.checks.parity import compare
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import nn

from prisma_core.contract.adapter import Adapter
from prisma_core.host import installed
from prisma_core.maps.places import FUSED, HookMap
from prisma_core.maps.reader import Reader
from prisma_core.spec import AnySpec

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

SCORES, PATTERN, V = (f"blocks.{{l}}.attn.hook_{name}" for name in ("attn_scores", "pattern", "v"))


def build() -> nn.Module:
    kind = timm.models.vision_transformer.VisionTransformer
    return kind(img_size=(8, 12), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=7)


class Opened(Adapter):
    """timm's adapter, its rows of scores and pattern replaced."""

    def __init__(self, scores: str, pattern: str, *, fused: bool = True):
        self.inner = installed().adapter(build())
        self.types = self.inner.types  # type: ignore[misc]
        place = f"blocks.{{l}}.attn @ {FUSED}"
        heads = "b h p d -> b p h d"
        rows = f"{place} : {scores} -> {SCORES}\n{place} : {pattern} -> {PATTERN}\n{place} : in2 -> {V} : {heads}"
        self.rows = HookMap.parse(rows)
        self.fused = fused

    def spec(self, upstream: Reader) -> AnySpec:
        return self.inner.spec(upstream)

    def weights(self, upstream: Reader, spec: AnySpec):
        return self.inner.weights(upstream, spec)

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        return self.inner.hooks(upstream, spec).without(SCORES, PATTERN, V) | self.rows

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return nullcontext() if self.fused else self.inner.unfused_attention(upstream)


def subject(adapter: Adapter) -> Subject:
    return Subject(Case("plain", build), adapter, build())


def test_scores_and_patterns_are_compared() -> None:
    right = subject(Opened("scores", "pattern"))
    assert {"blocks.0.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"} <= set(compare(right).errors)
    result = run_check(CHECKS["parity.hooks"], right)
    assert result.passed, str(result)


def test_the_pattern_for_the_scores_is_caught() -> None:
    result = run_check(CHECKS["parity.hooks"], subject(Opened("pattern", "pattern")))
    assert not result.passed
    assert "blocks.0.attn.hook_attn_scores differs by" in result.detail
    assert "hook_pattern differs" not in result.detail


def test_a_kernel_that_is_never_called_is_an_error() -> None:
    result = run_check(CHECKS["parity.hooks"], subject(Opened("scores", "pattern", fused=False)))
    assert not result.passed
    assert f"blocks.0.attn.hook_pattern: upstream never passed blocks.0.attn @ {FUSED} : pattern" in result.detail
