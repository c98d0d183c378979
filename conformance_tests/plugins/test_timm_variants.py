"""What timm's constructors can build beyond the registry: the same proof, or a refusal that names the feature."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from prisma_conformance.run import check
from torch import nn

import prisma_core as prisma
from prisma_core import UnsupportedArchitecture
from prisma_core.contract.case import Case

timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from timm.layers import AttentionPoolLatent, GluMlp, LayerNorm, LayerNormFp32, QuickGELU, RmsNorm, SwiGLU  # noqa: E402
from timm.models import vision_transformer as vit  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402

SMALL: dict[str, Any] = {
    "img_size": (24, 32),
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 7,
    "mlp_ratio": 2,
}
PLAIN_NORM = partial(LayerNorm, affine=False)


def plain(**given: Any) -> nn.Module:
    return vit.VisionTransformer(**{**SMALL, **given})


def distilled(**given: Any) -> nn.Module:
    return VisionTransformerDistilled(**{**SMALL, **given})


def latents(pool_type: str, **given: Any) -> nn.Module:
    model = plain(global_pool="map", class_token=False, reg_tokens=2, fc_norm=False)
    model.attn_pool = AttentionPoolLatent(24, num_heads=2, latent_len=3, pool_type=pool_type, **given)
    return model


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "other sizes": partial(plain, dynamic_img_size=True),
    "other sizes, positions on patches alone": partial(
        plain, dynamic_img_size=True, no_embed_class=True, reg_tokens=2, embed_norm_layer=LayerNorm
    ),
    "other sizes, two heads": partial(distilled, dynamic_img_size=True),
    "no positions": partial(plain, pos_embed="none", reg_tokens=1),
    "all tokens": partial(plain, global_pool="", num_classes=0, norm_layer=RmsNorm),
    "all tokens through a head": partial(plain, global_pool="", fc_norm=True),
    "mean of all tokens": partial(plain, global_pool="avg", pool_include_prefix=True, reg_tokens=3),
    "no final norm": partial(plain, final_norm=False, act_layer=nn.ReLU),
    "norms everywhere": partial(
        plain, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, pre_norm=True, act_layer=QuickGELU
    ),
    "root mean square norms everywhere": partial(
        plain, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, pre_norm=True, norm_layer=RmsNorm
    ),
    "norms in float32": partial(plain, norm_layer=LayerNormFp32, pre_norm=True),
    "norms without weights": partial(plain, norm_layer=PLAIN_NORM, pre_norm=True, qk_norm=True),
    "no biases": partial(plain, qkv_bias=False, proj_bias=False, init_values=0.1),
    "gate behind, packed": partial(plain, mlp_layer=GluMlp, scale_mlp_norm=True),
    "gate apart": partial(plain, mlp_layer=SwiGLU, scale_mlp_norm=True, act_layer=nn.SiLU),
    "norms after, no biases": partial(plain, block_fn=vit.ResPostBlock, qkv_bias=False, init_values=0.1),
    "parallel, scaled": partial(plain, block_fn=vit.ParallelScalingBlock, init_values=0.1, qk_norm=True),
    "parallel, no biases": partial(plain, block_fn=vit.ParallelScalingBlock, qkv_bias=False, proj_bias=False),
    "side by side": partial(plain, block_fn=vit.ParallelThingsBlock, qk_norm=True, scale_mlp_norm=True),
    "three side by side": partial(
        plain, block_fn=partial(vit.ParallelThingsBlock, num_parallel=3), init_values=0.1, mlp_layer=SwiGLU
    ),
    "first of three latents": partial(latents, "token", norm_layer=LayerNorm),
    "mean of three latents, normed queries": partial(latents, "avg", qk_norm=True, qkv_bias=False),
    "two heads, none of them": partial(distilled, num_classes=0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    report = check(Case(name, VARIANTS[name]))
    failed = [
        f"{one.name}: {one.detail}"
        for certificate in report.certificates
        for one in certificate.results
        if not one.passed and not one.skipped
    ]
    assert not failed, "\n".join(failed)


def gated() -> nn.Module:
    from timm.layers import Attention

    return plain(attn_layer=partial_class(Attention, gated=True))


def partial_class(kind: type, **given: Any) -> type:
    """A subclass with arguments filled in, which passes for its parent."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **{**kwargs, **given})
        self.__class__ = kind

    return type(kind.__name__, (kind,), {"__init__": build})


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "differential": (partial(plain, attn_layer="diff", num_heads=2), "differential attention"),
    "differential, parallel": (
        partial(plain, block_fn=vit.DiffParallelScalingBlock, num_heads=2),
        "differential attention",
    ),
    "gate": (gated, "gate"),
    "prr": (partial(plain, global_pool="prr"), "pooling"),
    "max": (partial(plain, global_pool="max"), "'max' pooling"),
    "act": (partial(plain, act_layer=nn.Mish), "activation"),
    "padded": (partial(plain, dynamic_img_pad=True), "padding"),
    "fused projection": (
        partial(plain, block_fn=partial(vit.ParallelScalingBlock, fuse_out_proj=True)),
        "one output projection",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_represented_is_named(name: str) -> None:
    build, feature = REFUSED[name]
    with pytest.raises(UnsupportedArchitecture, match=feature):
        prisma.adapt(build())


def test_edited_models_are_read_as_they_are() -> None:
    model = plain()
    model.blocks[1].mlp.act = nn.SiLU()
    model.reset_classifier(0, "")
    spec = prisma.adapt(model).spec
    assert [block.mlp.act for block in spec.blocks if block.mlp] == ["gelu", "silu"]
    assert (spec.pool.kind, spec.n_classes) == ("none", None)


def test_blocks_of_different_kinds() -> None:
    model = plain().double().eval()
    model.blocks[1] = plain(block_fn=vit.ResPostBlock).double().eval().blocks[1]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    image = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    torch.testing.assert_close(prisma.adapt(model)(image), model(image), rtol=1e-10, atol=1e-10)
    prisma.check(model, checks="parity.hooks").raise_for_failures()  # each block at the places of its own kind
    model.blocks[1] = plain(block_fn=vit.ParallelThingsBlock).blocks[1]
    with pytest.raises(UnsupportedArchitecture, match="different"):
        prisma.adapt(model)
