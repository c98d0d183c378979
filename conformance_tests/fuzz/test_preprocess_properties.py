"""From images to tensors: any size, mode and way in gives the same finite pixels."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from prisma_conformance.strategies import SEEDS

from prisma_core.inputs import Preprocess

SIDES = st.integers(1, 40)
MODES = st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])


@st.composite
def images(draw: st.DrawFn) -> Image.Image:
    height, width, mode = draw(SIDES), draw(SIDES), draw(MODES)
    pixels = np.random.default_rng(draw(SEEDS)).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])
    image = Image.fromarray(pixels)
    return (image.convert("RGB") if mode == "P" else image).convert(mode)


@st.composite
def preprocesses(draw: st.DrawFn) -> Preprocess:
    resampling = draw(st.sampled_from(["pillow", "torch"]))
    filters = ["nearest", "bilinear", "bicubic", *(["lanczos"] if resampling == "pillow" else [])]
    return Preprocess(
        size=(draw(st.integers(2, 24)), draw(st.integers(2, 24))),
        resize=draw(st.sampled_from(["shortest", "longest", "squash"])),
        crop=draw(st.sampled_from([0.875, 1.0, 1.2])),
        pad=draw(st.sampled_from(["black", "mean"])),
        interpolation=draw(st.sampled_from(filters)),
        resampling=resampling,
        corner=draw(st.sampled_from(["even", "floor"])),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.25),
        order=draw(st.sampled_from(["rgb", "bgr"])),
    )


@given(images(), preprocesses())
def test_any_image_gives_finite_pixels_of_one_size_however_it_comes(image: Image.Image, prepare: Preprocess) -> None:
    pixels = prepare(image)
    assert pixels.shape == (1, 3, *prepare.size)
    assert bool(pixels.isfinite().all())
    assert bool((prepare.denormalise(pixels) >= -1e-6).all())
    assert bool((prepare.denormalise(pixels) <= 1 + 1e-6).all())
    with TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        ways: list[object] = [image.copy(), [image, image]]
        if image.mode in ("RGB", "RGBA", "L", "I;16"):
            ways.append(np.asarray(image))
        if image.mode != "CMYK":
            image.save(path)
            ways += [path, str(path)]
        for way in ways:
            assert all(torch.equal(one, pixels[0]) for one in prepare(way))
    assert Preprocess.model_validate_json(prepare.model_dump_json()) == prepare


@given(st.lists(images(), min_size=1, max_size=3), preprocesses())
def test_a_list_of_images_is_each_of_them(several: list[Image.Image], prepare: Preprocess) -> None:
    assert torch.equal(prepare(several), torch.cat([prepare(one) for one in several]))
