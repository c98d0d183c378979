"""The same image gives the same tensor as upstream's own transform."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prisma_core.inputs import Preprocess

pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")

from prisma_timm.preprocessing import preprocess
from timm.data import create_transform, resolve_model_data_config

SIZES = [(37, 53), (53, 37), (224, 224), (300, 301), (641, 480), (1, 1), (2, 400), (255, 256), (16, 16)]
MODES = list(itertools.product(("center", "squash", "border"), ((3, 48, 48), (3, 32, 56), (3, 61, 40))))


def image_of(height: int, width: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(height * 1000 + width)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))


def config(**changes: Any) -> dict[str, Any]:
    given = {"input_size": (3, 48, 48), "interpolation": "bicubic", "crop_mode": "center", "crop_pct": 0.9}
    return {**given, "mean": (0.48, 0.45, 0.41), "std": (0.27, 0.26, 0.28), **changes}


@pytest.mark.parametrize(("mode", "size"), MODES)
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0, 1.15])
def test_pixels_are_those_of_timm_bit_for_bit(mode: str, size: tuple[int, int, int], crop: float) -> None:
    given = config(crop_mode=mode, input_size=size, crop_pct=crop)
    ours, theirs = preprocess(given), create_transform(**given)
    for height, width in SIZES:
        image = image_of(height, width)
        if min(image.size) < 3 and mode == "border":
            continue  # timm resizes the short side to nothing, and Pillow refuses
        assert torch.equal(ours(image)[0], theirs(image)), (height, width)


@pytest.mark.parametrize("filter_", ["bilinear", "bicubic", "nearest", "lanczos"])
def test_every_filter_is_that_of_timm(filter_: str) -> None:
    given = config(interpolation=filter_)
    image = image_of(101, 77)
    assert torch.equal(preprocess(given)(image)[0], create_transform(**given)(image))


def test_a_grey_model_reads_grey_images() -> None:
    given = config(input_size=(1, 32, 32), mean=(0.4,), std=(0.2,))
    image = image_of(50, 40, mode="L")
    ours = preprocess(given)(image)
    assert ours.shape == (1, 1, 32, 32)
    assert torch.equal(ours[0], create_transform(**given)(image))


def test_what_a_model_says_of_itself_is_what_it_gets() -> None:
    import timm

    for name in ("vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "vit_base_patch16_clip_224"):
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        given = resolve_model_data_config(model)
        image = image_of(240, 320)
        assert torch.equal(preprocess(given)(image)[0], create_transform(**given)(image))


def test_it_survives_json() -> None:
    given = preprocess(config(crop_mode="border"))
    assert Preprocess.model_validate_json(given.model_dump_json()) == given


def test_a_batch_is_its_images_one_by_one() -> None:
    ours = preprocess(config())
    images = [image_of(40, 50), image_of(60, 30)]
    assert torch.equal(ours(images), torch.cat([ours(image) for image in images]))
