"""From images to pixels: alpha, palettes, 16 bits, one channel, arrays and files that are no image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import truncate
from PIL import Image, ImageOps

import prisma_core as prisma
from prisma_core import HookedViT, InputError
from prisma_core.inputs import Preprocess

PREPROCESS = Preprocess(size=(8, 12))


def _pixels(array: Any) -> np.ndarray[Any, Any]:
    """Preprocess an array and return the pixels as colours in 0..1, ``[height width channel]``."""
    return PREPROCESS.denormalise(PREPROCESS(array))[0].permute(1, 2, 0).numpy()


def test_one_pixel() -> None:
    pixels = _pixels(np.array([[[255, 0, 51]]], dtype=np.uint8))
    assert pixels.shape == (8, 12, 3)
    np.testing.assert_allclose(pixels, np.broadcast_to([1.0, 0.0, 0.2], pixels.shape), atol=1e-6)


def test_alpha_lies_on_white() -> None:
    half = np.full((8, 12, 4), [255, 0, 0, 0], dtype=np.uint8)
    half[:, 6:, 3] = 255
    pixels = _pixels(half)
    np.testing.assert_allclose(pixels[:, :6], 1.0, atol=1e-6)
    np.testing.assert_allclose(pixels[:, 6:], np.broadcast_to([1.0, 0.0, 0.0], (8, 6, 3)), atol=1e-6)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (12, 8), 1)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.save(tmp_path / "palette.png", transparency=1)
    np.testing.assert_allclose(PREPROCESS.denormalise(PREPROCESS(tmp_path / "palette.png")).numpy(), 1.0, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "palette", "P", "RGB", "L"])
def test_transparency_of_any_mode_lies_on_white(mode: str) -> None:
    """Every second column is transparent, and of a colour that must not show through."""
    array = np.full((8, 12, 4), [40, 40, 40, 255], dtype=np.uint8)
    array[:, ::2] = [200, 200, 200, 0]
    rgba = Image.fromarray(array)
    image = rgba.convert("RGBa" if mode == "La" else mode) if mode in ("RGBA", "RGBa", "LA") else rgba
    if mode == "La":
        image = rgba.convert("LA").convert("La")
    elif mode in ("palette", "PA"):
        image = rgba.quantize(4, method=Image.Quantize.FASTOCTREE)
        image = image.convert("PA") if mode == "PA" else image
    elif mode in ("P", "RGB", "L"):
        image = rgba.convert("RGB").quantize(4) if mode == "P" else rgba.convert("RGB").convert(mode)
        clear = image.getpixel((0, 0))
        image.info["transparency"] = clear
    expected = np.full((8, 12, 3), 40 / 255)
    expected[:, ::2] = 1
    np.testing.assert_allclose(_pixels(image), expected, atol=0.01)


def test_colours_that_pillow_does_not_convert() -> None:
    with pytest.raises(InputError, match="LAB"):
        PREPROCESS(Image.new("LAB", (12, 8)))
    for mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"):
        assert PREPROCESS(Image.new(mode, (12, 8))).isfinite().all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_turns_an_image_however_it_is_given(tmp_path: Path, turn: int) -> None:
    array = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    image = Image.fromarray(array)
    image.getexif()[0x0112] = turn
    image.save(tmp_path / "turned.png", exif=image.getexif())
    opened = Image.open(tmp_path / "turned.png")
    upright = ImageOps.exif_transpose(opened)
    assert (turn == 1) == np.array_equal(np.asarray(upright), array)
    for given in (tmp_path / "turned.png", str(tmp_path / "turned.png"), opened, image):
        np.testing.assert_array_equal(_pixels(given), _pixels(np.asarray(upright)))


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(("size", "crop"), [((1, 9), 1.2), ((9, 1), 3.0), ((1, 1), 40.0)])
def test_a_side_of_one_pixel_with_padding_around_it(size: tuple[int, int], crop: float, resize: Any) -> None:
    preprocess = Preprocess(size=size, crop=crop, resize=resize)
    assert preprocess(np.full((20, 30, 3), 255, dtype=np.uint8)).shape == (1, 3, *size)


@pytest.mark.parametrize("as_file", [False, True])
def test_sixteen_bits(tmp_path: Path, as_file: bool) -> None:
    array = np.full((8, 12), 13107, dtype=np.uint16)  # a fifth of 65535
    source: Any = array
    if as_file:
        Image.fromarray(array).save(tmp_path / "deep.png")
        source = tmp_path / "deep.png"
    np.testing.assert_allclose(PREPROCESS.denormalise(PREPROCESS(source)).numpy(), 0.2, atol=1e-6)


def test_dark_images_of_sixteen_bits_stay_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 12), 200, dtype=np.uint16)).save(tmp_path / "dark.png")
    assert PREPROCESS.denormalise(PREPROCESS(tmp_path / "dark.png")).max() < 0.01


def test_images_of_floats_are_checked_as_arrays_are() -> None:
    array = np.full((8, 12), 0.25, dtype=np.float32)
    np.testing.assert_allclose(_pixels(Image.fromarray(array)), 64 / 255, atol=1e-6)
    array[0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        PREPROCESS(Image.fromarray(array))


def test_one_channel_becomes_three_and_three_become_one() -> None:
    grey = np.full((8, 12), 102, dtype=np.uint8)
    np.testing.assert_allclose(_pixels(grey), 0.4, atol=1e-6)
    np.testing.assert_allclose(_pixels(grey[:, :, None]), 0.4, atol=1e-6)
    single = Preprocess(size=(8, 12), mean=(0.0,), std=(1.0,))
    assert single(np.full((8, 12, 3), 102, dtype=np.uint8)).shape == (1, 1, 8, 12)


def test_files_and_objects_that_are_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(InputError, match=r"text\.jpg.*Pillow"):
        PREPROCESS(tmp_path / "text.jpg")
    with pytest.raises(InputError, match=r"absent\.png"):
        PREPROCESS(tmp_path / "absent.png")
    with pytest.raises(InputError, match=str(tmp_path)):
        PREPROCESS(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    truncate(tmp_path / "cut.png")
    with pytest.raises(InputError, match=r"cut\.png"):
        PREPROCESS(tmp_path / "cut.png")
    for nothing in (None, 3, object()):
        with pytest.raises(InputError, match="path, a Pillow image, an array or a tensor"):
            PREPROCESS(nothing)
    with pytest.raises(InputError, match="empty list"):
        PREPROCESS([])


@pytest.mark.parametrize(
    ("array", "fact"),
    [
        (np.zeros((8, 12, 2), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((2, 8, 12), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 12), np.uint8), r"\[0, 12\]"),
        (np.zeros((8, 12), np.int64), "int64"),
        (np.full((8, 12), np.nan), "96 values.*NaN"),
        (np.full((8, 12), 3.0), r"0\.\.1.*3\.\.3"),
    ],
)
def test_arrays_that_are_no_image(array: np.ndarray[Any, Any], fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        PREPROCESS(array)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_may_come_first_and_images_along_a_first_axis(channels: int) -> None:
    images = np.random.default_rng(channels).integers(0, 256, (2, 8, 12, channels), np.uint8)
    expected = PREPROCESS(list(images))
    first = images.transpose(0, 3, 1, 2)
    for given in (images, first, list(first), torch.from_numpy(first.copy()), torch.from_numpy(first / 255)):
        assert torch.equal(PREPROCESS(given), expected)
    square = np.random.default_rng(0).integers(0, 256, (3, 9, 3), np.uint8)  # either axis may be channels: the last is
    assert torch.equal(PREPROCESS(square), PREPROCESS(Image.fromarray(square)))


def test_an_image_for_the_model_goes_through_preprocess(vit: HookedViT) -> None:
    with pytest.raises(InputError, match=r"model\.preprocess"):
        vit(Image.new("RGB", (8, 8)))


def test_a_model_without_preprocessing_says_how_to_set_it(make: Callable[..., HookedViT], tmp_path: Path) -> None:
    model = make()
    assert not model.preprocess
    for one in (model, copy.deepcopy(model), prisma.load(f"file:{prisma.save(model, tmp_path)}")):
        assert one.preprocess == model.preprocess
        with pytest.raises(InputError, match=r"model\.preprocess = prisma_core\.plugin\.Preprocess"):
            one.preprocess("cat.jpg")
        with pytest.raises(AttributeError, match=r"mean.*preprocess"):
            _ = one.preprocess.mean


@pytest.mark.parametrize(
    "field",
    [{"std": (0, 0, 0)}, {"std": (1, -1, 1)}, {"mean": (0.5,)}, {"mean": (), "std": ()}, {"std": (1, 1, 1e999)}],
)
def test_means_and_deviations_that_give_no_finite_pixels(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"std|mean"):
        Preprocess(size=(8, 8), **field)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_image_may_shrink_to_one_pixel(interpolation: str, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    array = torch.from_numpy(np.array(image)).reshape(5, 4, -1)
    size = {
        "mean": (0.5,) * array.shape[2],
        "std": (0.2,) * array.shape[2],
        "size": (1, 1),
        "resize": "squash",
        "crop": 1.0,
    }
    prepare = Preprocess.model_validate({**size, "interpolation": interpolation, "resampling": "torch"})
    exact = torch.nn.functional.interpolate(
        array.permute(2, 0, 1)[None].double(), (1, 1), mode=interpolation, antialias=True
    )
    assert float((prepare.denormalise(prepare(image)) * 255 - exact).abs().max()) <= 1.0
