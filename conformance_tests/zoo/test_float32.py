"""In float32, plain pre-LN models with the same attention kernel equal timm to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prisma_conformance.randomise import randomise

import prisma_core as prisma

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

PLAIN: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "clip": {"pre_norm": True},
    "mean": {"class_token": False, "global_pool": "avg"},
    "mean and norm": {"global_pool": "avg", "fc_norm": True},
    "layer scale": {"init_values": 0.3},
    "no bias": {"qkv_bias": False},
    "not square": {"img_size": (48, 32), "patch_size": (8, 16)},
    "any size": {"dynamic_img_size": True},
    "no head": {"num_classes": 0},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", PLAIN)
@torch.no_grad()
def test_logits_are_equal_to_the_bit(kind: str, batch: int) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 72, "num_heads": 3, "depth": 4, "num_classes": 11}
    upstream = timm.models.vision_transformer.VisionTransformer(**{**sizes, **PLAIN[kind]}).eval()
    randomise(upstream, torch.Generator().manual_seed(0))
    model = prisma.adapt(upstream)
    image = torch.randn(batch, 3, *model.spec.image_size, generator=torch.Generator().manual_seed(1))
    theirs = upstream(image)
    assert theirs.std() > 0.01
    assert torch.equal(model(image), theirs)
    logits, _ = model.run_with_cache(image, names=["resid_post", "z", "mlp.post", "scale"])
    assert torch.equal(logits, theirs), "reading what the fused kernels show changes no bit"
