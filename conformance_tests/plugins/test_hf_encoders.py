"""What the adapters of transformers' encoders read, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prisma_core import UnsupportedArchitecture, adapt

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")

from prisma_hf.calling import main_output  # noqa: E402
from prisma_hf.cases import autoencoder, built  # noqa: E402
from prisma_hf.parts import explicit_attention  # noqa: E402


@pytest.mark.parametrize(
    ("name", "given", "feature"),
    [
        ("ViTModel", {"hidden_act": "gelu_10"}, "activation"),
        ("Phi4MultimodalVisionModel", {}, "causal attention"),
        ("MgpstrModel", {"distilled": True, "image_size": (16, 24)}, "positions"),
        ("PixioModel", {"image_size": (16, 24), "n_cls_tokens": 3}, "square grid"),
        ("JanusVisionModel", {"use_qk_norm": True}, "with which upstream itself fails"),
        ("Aimv2VisionModel", {"is_native": True, "hidden_act": "silu"}, "position_embedding"),
        ("DPTModel", {"is_hybrid": True, "image_size": 32, "patch_size": 16}, "patch_embeddings"),
    ],
)
def test_what_a_class_may_have_and_we_cannot_represent_is_refused(name: str, given: Any, feature: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=feature):
        adapt(built(name, **given))


@torch.no_grad()
def test_positions_that_upstream_looks_up_unevenly() -> None:
    upstream: Any = built("Idefics2VisionTransformer", image_size=38, patch_size=2).eval().double()
    torch.nn.init.normal_(upstream.embeddings.position_embedding.weight)
    model = adapt(upstream)
    rows = upstream.embeddings.position_embedding.weight
    assert not torch.equal(model.embed.pos_embed, rows)
    image = torch.randn(1, 2, 38, 38).double()
    assert torch.allclose(model(image), main_output(upstream, image), rtol=0, atol=1e-10)


@torch.no_grad()
def test_explicit_attention_leaves_upstream_as_it_was() -> None:
    upstream: Any = built("Data2VecVisionModel").eval()
    kinds = [type(part) for part in upstream.modules()]
    before = upstream.config._attn_implementation
    image = torch.randn(1, 2, 24, 24)
    fused = main_output(upstream, image)
    with explicit_attention(upstream):
        assert torch.allclose(main_output(upstream, image), fused, atol=1e-5)
        assert [type(part) for part in upstream.modules()] != kinds
    with pytest.raises(ValueError, match="channel"), explicit_attention(upstream):
        upstream(torch.randn(1, 5, 24, 24))
    assert [type(part) for part in upstream.modules()] == kinds
    assert upstream.config._attn_implementation == before


@pytest.mark.parametrize("size", [(40, 24), (16, 32)])
@pytest.mark.parametrize("name", ["ViTModel", "DPTModel", "Tipsv2VisionModel"])
@torch.no_grad()
def test_other_sizes_follow_upstreams_interpolation(name: str, size: tuple[int, int]) -> None:
    upstream: Any = built(name, **({"is_hybrid": False} if name == "DPTModel" else {})).eval().double()
    for parameter in upstream.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image = torch.randn(2, 2, *size).double()
    model = adapt(upstream)
    assert torch.allclose(model(image), main_output(upstream, image), rtol=0, atol=1e-10)
    native = torch.nn.functional.interpolate(image, (24, 24))
    assert not torch.allclose(model(native).mean(1), model(image).mean(1))


@torch.no_grad()
def test_a_masked_autoencoder_hides_what_the_noise_says() -> None:
    upstream: Any = autoencoder().eval().mae
    image = torch.randn(2, 2, 24, 24)
    noise = torch.rand(2, 9, generator=torch.Generator().manual_seed(0))
    model = adapt(upstream)
    pixels = model(image, noise=noise)
    assert torch.equal(pixels, upstream(image, noise=noise).logits)
    _, cache = model.run_with_cache(image, noise=noise)
    assert cache["blocks.0.hook_resid_pre"].shape == (2, 1 + 4, 24)  # the class token and what is not hidden
    assert cache["decoder.blocks.1.attn.hook_pattern"].shape == (2, 2, 10, 10)
    other = torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    assert not torch.allclose(model(image, noise=other), pixels)
