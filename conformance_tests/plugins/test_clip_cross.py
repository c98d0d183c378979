"""One set of CLIP's weights, exported to open_clip's, transformers' and timm's layout, gives the same activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prisma_conformance.randomise import randomise
from torch import Tensor, nn

import prisma_core as prisma
from prisma_core.transformer import ZooModel
from prisma_core.zoo import tensors_of

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: pip install 'prisma-interp[clip]'")
timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

from prisma_clip.cases import with_bert  # noqa: E402

WIDTH, LAYERS, HEADS, EMBED, SIDE, PATCH, EPS = 48, 3, 3, 20, 16, 4, 1e-5


def of_open_clip() -> Any:
    vision = {"width": WIDTH, "layers": LAYERS, "head_width": 16, "patch_size": PATCH, "image_size": SIDE}
    text = {"width": 32, "layers": 2, "heads": 2, "context_length": 9, "vocab_size": 40}
    model = open_clip.create_model(
        "ViT-B-32-quickgelu", load_weights=False, embed_dim=EMBED, vision_cfg=vision, text_cfg=text
    )
    randomise(model, torch.Generator().manual_seed(0))
    for part in model.modules():
        if isinstance(vars(part).get("eps"), float):
            part.eps = EPS
    return model.double().eval()


def of_transformers() -> Any:
    shared = {"hidden_act": "quick_gelu", "layer_norm_eps": EPS, "projection_dim": EMBED}
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    vision |= {"num_attention_heads": HEADS, "image_size": SIDE, "patch_size": PATCH}
    text = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"max_position_embeddings": 9, "vocab_size": 40, "eos_token_id": 2, "bos_token_id": 0}
    config = transformers.CLIPConfig(vision_config=vision | shared, text_config=text | shared, projection_dim=EMBED)
    return transformers.CLIPModel(config).double().eval()


def of_timm() -> Any:
    sizes = {"embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "img_size": SIDE, "patch_size": PATCH}
    return timm.create_model("vit_base_patch32_clip_quickgelu_224", num_classes=EMBED, **sizes).double().eval()


def filled(upstream: nn.Module, weights: dict[str, Tensor]) -> ZooModel:
    """Return a hooked model of upstream with canonical weights, put into upstream's own layout on the way."""
    empty = prisma.adapt(upstream)
    assert empty.origin is not None
    wanted = tensors_of(empty)
    assert set(wanted) == set(weights)
    state = empty.origin.map.backward(weights, tensors_of(upstream))
    upstream.load_state_dict({name: state[name] for name in upstream.state_dict()})
    return prisma.adapt(upstream)


def renamed(weights: dict[str, Tensor], before: str, after: str) -> dict[str, Tensor]:
    return {name.replace(before, after): tensor.detach() for name, tensor in weights.items()}


@torch.no_grad()
def test_open_clip_and_transformers() -> None:
    ours = prisma.adapt(of_open_clip())
    # transformers norms the class token alone, open_clip all tokens before it takes the class token.
    theirs = filled(of_transformers(), renamed(tensors_of(ours), "vision.ln_final", "vision.ln_pool"))
    inputs = [x.double() if x.is_floating_point() else x for x in ours.sample_inputs(2)]
    logits, acts = ours.run_with_cache(*inputs)
    others, other_acts = theirs.run_with_cache(*inputs)
    assert torch.allclose(logits, others, atol=1e-11)
    alone = set(acts) ^ set(other_acts)
    assert all(name.startswith(("vision.ln_", "vision.hook_ln_final")) for name in alone)
    common = [name for name in acts if name in other_acts and name != "vision.hook_pooled"]
    assert len(common) > 100
    for name in common:
        assert torch.allclose(acts[name], other_acts[name], atol=1e-11), name
    normed = theirs.vision.ln_pool(other_acts["vision.hook_pooled"])
    assert torch.allclose(acts["vision.hook_pooled"], normed, atol=1e-11)


@torch.no_grad()
def test_open_clip_and_timm() -> None:
    whole = prisma.adapt(of_open_clip())
    ours = whole.vision
    theirs = filled(of_timm(), {name: tensor.detach() for name, tensor in tensors_of(ours).items()})
    assert theirs.spec == ours.spec, "the facts are the same"
    image = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64)
    _, acts = ours.run_with_cache(image)
    _, other_acts = theirs.run_with_cache(image)
    assert set(acts) == set(other_acts)
    for name in acts:
        assert torch.allclose(acts[name], other_acts[name], atol=1e-11), name


def test_a_text_tower_of_transformers_in_open_clip_is_checked_by_itself() -> None:
    tower = with_bert("roberta-ViT-B-32", "Roberta").text
    prisma.check(tower, checks="parity.*").raise_for_failures()
