"""Image processors of transformers as data: both backends, and what is left to upstream."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is missing: pip install 'prisma-interp[hf]'")
pytest.importorskip("torchvision", reason="torchvision is missing: pip install 'prisma-interp[hf]'")

from PIL import Image  # noqa: E402
from prisma_hf.pictures import preprocess, reference  # noqa: E402

SETTINGS: dict[str, dict[str, Any]] = {
    "ViT": {"size": {"height": 30, "width": 50}, "resample": 0},
    "DeiT": {"size": {"height": 41, "width": 37}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
    "Beit": {"size": {"height": 33, "width": 33}, "do_normalize": False},
    "CLIP": {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}},
    "Bit": {"size": {"shortest_edge": 32}, "crop_size": {"height": 40, "width": 40}, "image_std": [0.1, 0.2, 0.3]},
}


@pytest.mark.parametrize("backend", ["", "Pil"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_processor_is_repeated_to_the_byte(name: str, backend: str) -> None:
    processor = getattr(transformers, f"{name}ImageProcessor{backend}")(**SETTINGS[name])
    ours = preprocess(processor)
    if name == "DeiT":
        assert ours is None  # two axes cut by different shares: one number does not say it
        return
    assert ours is not None
    assert ours.resampling == ("pillow" if backend else "torch")
    for width, height in ((61, 43), (29, 31), (33, 90)):
        noise = np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype("uint8")
        picture = Image.fromarray(noise)
        assert torch.allclose(ours(picture)[0], reference(processor)(picture), rtol=0, atol=1e-5)


def test_what_a_processor_does_besides_is_seen() -> None:
    assert preprocess(transformers.ViTImageProcessor(do_resize=False)) is None
    assert preprocess(transformers.ViTImageProcessor(rescale_factor=1 / 127.5)) is None
    assert preprocess(transformers.CLIPImageProcessor(do_center_crop=False)) is None
    assert preprocess(transformers.Owlv2ImageProcessor()) is None
    assert preprocess(transformers.Idefics2ImageProcessor()) is None
    assert preprocess(transformers.EfficientNetImageProcessor()) is None


def test_pillow_and_tensors_resize_differently() -> None:
    """Else the two backends need not be told apart."""
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3)).astype("uint8")
    one = preprocess(transformers.ViTImageProcessor())
    other = preprocess(transformers.ViTImageProcessorPil())
    assert one is not None
    assert other is not None
    assert not torch.equal(one(Image.fromarray(noise)), other(Image.fromarray(noise)))


def test_a_processor_that_scales_before_it_resizes() -> None:
    processor = transformers.DINOv3ViTImageProcessor(size={"height": 41, "width": 37})
    ours = preprocess(processor)
    assert ours is not None
    assert ours.resampling == "torch_float"
    noise = np.random.default_rng(3).integers(0, 256, (61, 90, 3)).astype("uint8")
    picture = Image.fromarray(noise)
    assert torch.allclose(ours(picture)[0], reference(processor)(picture), rtol=0, atol=1e-6)
