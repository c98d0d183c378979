"""What the adapters of transformers' encoders read, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange, repeat

from prisma_core import UnsupportedArchitecture, adapt

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")

from prisma_hf.canonical.calling import images_apart, main_output  # noqa: E402
from prisma_hf.canonical.parts import explicit_attention  # noqa: E402
from prisma_hf.cases import autoencoder, built  # noqa: E402

SAPIENS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads_per_layer": [4, 2]}


@pytest.mark.parametrize(
    ("name", "given", "feature"),
    [
        ("ViTModel", {"hidden_act": "gelu_10"}, "activation"),
        ("Phi4MultimodalVisionModel", {}, "causal attention"),
        ("MgpstrModel", {"distilled": True, "image_size": (16, 24)}, "positions"),
        ("PixioModel", {"image_size": (16, 24), "n_cls_tokens": 3}, "square grid"),
        ("JanusVisionModel", {"use_qk_norm": True}, "with which upstream itself fails"),
        ("Aimv2VisionModel", {"is_native": True, "hidden_act": "silu"}, "positions made for each image"),
        ("DPTModel", {"is_hybrid": True, "image_size": 32, "patch_size": 16}, "patch_embeddings"),
        ("BridgeTowerVisionModel", {"hidden_size": 128, "stop_gradient": True}, "without their gradient"),
        ("Molmo2VisionModel", {"head_dim": 8, "num_position_embeddings": 10, "image_size": [24, 24]}, "10 positions"),
        ("Qwen3_5VisionModel", {"num_position_embeddings": 10}, "10 positions"),
        ("Qwen3VLVisionModel", {"deepstack_visual_indexes": [0], "hidden_act": "tanh"}, "activation"),
        ("Sapiens2Model", {**SAPIENS, "query_bias": False, "value_bias": False}, "biases of keys alone"),
        ("PixtralVisionModel", {"hidden_size": 32, "num_attention_heads": 2, "hidden_act": "tanh"}, "activation"),
    ],
)
def test_what_a_class_may_have_and_we_cannot_represent_is_refused(name: str, given: Any, feature: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=feature):
        adapt(built(name, **given))


def test_attention_that_hides_patches_or_adds_tokens_is_refused() -> None:
    def changed(**given: Any) -> Any:
        upstream: Any = built("BridgeTowerVisionModel", hidden_size=128)
        block = upstream.visual.transformer.resblocks[1]
        for name, value in given.items():
            setattr(block if name == "attn_mask" else block.attn, name, value)
        return upstream

    adapt(changed())
    for given in ({"attn_mask": torch.zeros(10, 10)}, {"add_zero_attn": True}, {"bias_k": torch.zeros(1, 1, 128)}):
        with pytest.raises(UnsupportedArchitecture, match=r"hidden from others|tokens added"):
            adapt(changed(**given))
    with pytest.raises(UnsupportedArchitecture, match="batch_first=True"):
        adapt(changed(batch_first=True))


def test_rotary_positions_of_other_patches_than_the_projections_are_refused() -> None:
    upstream: Any = built("Sapiens2Model", **SAPIENS)
    upstream.rope_embeddings.config = type(upstream.config)(patch_size=4)
    with pytest.raises(UnsupportedArchitecture, match="rotary positions for patches of 4"):
        adapt(upstream)


@torch.no_grad()
def test_key_heads_are_counted_layer_by_layer() -> None:
    model: Any = adapt(built("Sapiens2Model", **SAPIENS))
    assert [block.attn.n_kv_heads for block in model.spec.blocks] == [4, 2]
    _, cache = model.run_with_cache(torch.randn(1, 2, 24, 24))
    assert [cache["k", layer].shape[2] for layer in (0, 1)] == [4, 2]
    assert cache["pattern", 1].shape[1] == 4


@torch.no_grad()
def test_images_of_a_packed_sequence_do_not_see_each_other() -> None:
    upstream: Any = built("PixtralVisionModel", hidden_size=32, num_attention_heads=2).eval().double()
    model = adapt(upstream)
    image = torch.randn(3, 2, 40, 16).double()
    together, alone = upstream(image).last_hidden_state, model(image[1:2])
    assert together.shape == (1, 3 * 10, 32)
    assert torch.allclose(together[:, 10:20], alone, rtol=0, atol=1e-10)
    with explicit_attention(upstream), images_apart(upstream.transformer):
        assert torch.allclose(upstream(image).last_hidden_state, model(image), rtol=0, atol=1e-10)
    assert upstream(image).last_hidden_state.shape == together.shape


QWEN = {"in_channels": 2, "patch_size": 4, "num_position_embeddings": 16, "out_hidden_size": 20}


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (6, 2)])
@torch.no_grad()
def test_tokens_do_not_depend_on_the_order_in_which_patches_are_listed(rows: int, columns: int) -> None:
    upstream: Any = built("Qwen3_5VisionModel", **QWEN).eval().double()
    image = torch.randn(2, 2, rows * 4, columns * 4).double()
    blocks = "b c (r i p) (s j q) -> (b r s i j) (c t p q)"  # by itself upstream counts two by two
    listed = repeat(image, blocks, i=2, j=2, p=4, q=4, t=2)
    theirs = upstream(listed, grid_thw=torch.tensor([[1, rows, columns]] * 2)).last_hidden_state
    ours = rearrange(adapt(upstream)(image), "b (r i s j) d -> (b r s i j) d", i=2, j=2, s=columns // 2)
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-10)


def test_a_projection_of_frames_that_is_none_of_patches_is_refused() -> None:
    upstream: Any = built("Qwen3_5VisionModel", **QWEN)
    upstream.patch_embed.proj.padding = (0, 1, 1)
    with pytest.raises(UnsupportedArchitecture, match="pads, skips or splits"):
        adapt(upstream)
    upstream.patch_embed.proj.stride = (2, 2, 2)
    with pytest.raises(UnsupportedArchitecture, match="overlap"):
        adapt(upstream)


@torch.no_grad()
def test_torchs_attention_step_by_step_where_positions_come_first() -> None:
    upstream: Any = torch.nn.MultiheadAttention(12, 3).eval().double()
    stream = torch.randn(5, 2, 12).double()  # of which every axis has another length
    fused = upstream(stream, stream, stream)[0]
    with explicit_attention(upstream):
        assert torch.allclose(upstream(stream, stream, stream)[0], fused, rtol=0, atol=1e-12)


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
