"""What ``adapt`` finds on a model: preprocessing and labels of its library, and parts that it could have been given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import prisma_core as prisma
from prisma_core import UnknownName, UnsupportedArchitecture

SMALL: dict[str, Any] = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8}


def vit(**options: Any) -> nn.Module:
    return pytest.importorskip("timm").create_model("vit_tiny_patch16_224", **{**SMALL, **options})


@pytest.mark.parametrize("options", [{}, {"num_classes": 7}, {"num_classes": 0}], ids=str)
def test_what_timm_says_about_a_model(options: dict[str, Any]) -> None:
    adapted = prisma.adapt(vit(**options))
    loaded = prisma.load("timm:vit_tiny_patch16_224", pretrained=False, **{**SMALL, **options})
    image = Image.new("RGB", (40, 50), (10, 200, 90))
    assert torch.equal(adapted.preprocess(image), loaded.preprocess(image))
    assert adapted.labels == loaded.labels
    assert (adapted.labels is None) == bool(options)


def test_a_timm_model_that_was_made_by_its_class() -> None:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    adapted = prisma.adapt(vision_transformer.VisionTransformer(**SMALL))
    assert adapted.labels is None


def test_what_transformers_says_about_a_model() -> None:
    tr = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 9,
        "image_size": 32,
    }
    for names in ({}, {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}):
        model = tr.ViTForImageClassification(tr.ViTConfig(**sizes, **names))
        assert prisma.adapt(model).labels == (("cat", "dog") if names else None)
        model.classifier = nn.Linear(24, 3)
        assert prisma.adapt(model).labels is None


@pytest.mark.parametrize("part", ["whole", "visual"])
@pytest.mark.parametrize("told", [{}, {"image_mean": (0.1, 0.2, 0.3), "image_interpolation": "bilinear"}], ids=str)
def test_what_open_clip_says_about_a_model(part: str, told: dict[str, Any]) -> None:
    open_clip = pytest.importorskip("open_clip")
    sizes = {"width": 32, "layers": 1, "head_width": 16, "image_size": 32, "patch_size": 8}
    text = {"width": 16, "heads": 2, "layers": 1}
    model, _, transform = open_clip.create_model_and_transforms(
        "ViT-B-32", embed_dim=8, vision_cfg=sizes, text_cfg=text, **told
    )
    image = Image.effect_noise((60, 40), 90).convert("RGB")
    adapted = prisma.adapt(model if part == "whole" else model.visual)
    assert torch.equal(adapted.preprocess(image)[0], transform(image))
    model.visual.preprocess_cfg |= {"resize_mode": "longest", "fill_color": 9}  # which no Preprocess does
    assert not prisma.adapt(model).preprocess


class Wrapper(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.inner = nn.ModuleDict({"backbone": backbone})


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (Wrapper, r"inner\.backbone"),
        (lambda model: Wrapper(nn.DataParallel(model)), r"inner\.backbone\.module"),
    ],
)
def test_a_model_in_a_wrapper_of_the_user_s_is_named(wrap: Any, path: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"VisionTransformer, which is: pass model\.{path};"):
        prisma.adapt(wrap(vit()))


@pytest.mark.parametrize("name", ["openai/clip-vit-base-patch32", "google/vit-base-patch16-224", "a/b.c@main"])
def test_a_name_on_the_hub_without_a_source(name: str) -> None:
    with pytest.raises(UnknownName, match=rf"Did you mean .*hf:{name}"):
        prisma.load(name)


def test_a_head_of_another_number_of_classes_has_not_the_librarys_labels() -> None:
    replaced: Any = vit()
    assert prisma.adapt(replaced).labels is not None
    replaced.head = nn.Linear(24, 3)
    assert prisma.adapt(replaced).labels is None
