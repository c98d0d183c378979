"""What people give on their first day in the place of an image or a reference: taken as meant, or told what to give."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import prisma_core as prisma
from prisma_core import InputError, PrismaError, UnknownName
from prisma_core.inputs import Preprocess

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
PREPARE = Preprocess(size=(16, 16))
EXPECTED = PREPARE(IMAGE)


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    IMAGE.save("a.png")


NAMES = ("sp ace b#50%.png", "a%20b.png", "?x.png", "üñ 猫.png", "--help.png", "~x.png")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_are_taken_as_they_are(name: str) -> None:
    IMAGE.save(name)
    assert torch.equal(PREPARE(name), EXPECTED)


def test_the_home_folder_is_known_by_its_sign(tmp_path: Path) -> None:
    assert torch.equal(PREPARE("~/a.png"), EXPECTED)
    assert torch.equal(PREPARE(Path("~/a.png")), EXPECTED)
    assert prisma.save(prisma.load("toy:digits"), "~/saved") == tmp_path / "saved"
    assert not Path("~").exists()
    for reference in ("file:~/saved", Path("~/saved")):
        assert type(prisma.load(reference)).__name__ == "HookedViT"


SAME: dict[str, Callable[[], Any]] = {
    "channels first": lambda: PIXELS.transpose(2, 0, 1),
    "in 0..1": lambda: PIXELS / 255.0,
    "in 0..1, halves": lambda: torch.tensor(PIXELS / 255.0).float(),
    "of 16 bits": lambda: PIXELS.astype(np.uint16) * 257,
    "turned round in memory": lambda: np.ascontiguousarray(PIXELS[::-1])[::-1],
    "a batch of one": lambda: PIXELS[None],
    "a list of one": lambda: [IMAGE],
    "a tuple of a path": lambda: ("a.png",),
    "a list of a batch": lambda: [torch.tensor(PIXELS).permute(2, 0, 1)[None]],
    "numpy's text": lambda: np.str_("a.png"),
}


@pytest.mark.parametrize("kind", SAME)
def test_one_image_in_many_forms(kind: str) -> None:
    assert torch.equal(PREPARE(SAME[kind]()), EXPECTED)


def test_lists_of_batches_of_several_lengths_are_one_batch() -> None:
    assert PREPARE([PIXELS[None], np.stack([PIXELS, PIXELS])]).shape == (3, 3, 16, 16)


def closed(name: str) -> Image.Image:
    with Image.open(name) as image:
        return image


def cut(name: str) -> Image.Image:
    Image.effect_noise((64, 64), 50).save(name)
    Path(name).write_bytes(Path(name).read_bytes()[:1000])
    return Image.open(name)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a folder": (
        lambda: Path("."),
        r"is a folder: give an image, or a list.*iterdir\(\)",
    ),
    "an empty name": (lambda: "", "No image at ''"),
    "an address": (lambda: "https://example.com/cat.jpg", "is an address.*Download"),
    "an address of a store": (lambda: "s3://bucket/cat.jpg", "is an address.*Download"),
    "a file's address": (lambda: "file:///a.png", "is an address"),
    "data in an address": (lambda: "data:image/png;base64,iVBORw0KGgo=", "is an address"),
    "bytes": (lambda: Path("a.png").read_bytes(), r"PIL\.Image\.open\(io\.BytesIO"),
    "a stream": (lambda: io.BytesIO(Path("a.png").read_bytes()), r"PIL\.Image\.open"),
    "a list of lists": (PIXELS.tolist, r"got a value of type list\. Pixels go in as an array: numpy\.asarray"),
    "lists of paths": (lambda: [["a.png"], ["a.png", "a.png"]], r"got \['a\.png'\]\..*one flat list"),
    "a generator": (lambda: (each for each in ["a.png"]), r"as a list: list\(images\)"),
    "a glob": (lambda: Path().glob("*.png"), r"as a list: list\(images\)"),
    "a set": (lambda: {"a.png"}, r"as a list: list\(images\)"),
    "a row of a data set": (lambda: {"image": IMAGE, "label": 3}, r"the image alone, as in row\['image'\]"),
    "nothing": (lambda: None, "got None"),
    "an image and its label": (lambda: (IMAGE, 3), r"got 3\..*one flat list, without their labels"),
    "images with labels": (lambda: [(IMAGE, 3)], r"one flat list, without their labels"),
    "an image whose file was closed": (lambda: closed("a.png"), r"its file is closed: call image\.load\(\) while"),
    "an image whose file is cut": (lambda: cut("a.png"), "cannot be decoded: image file is truncated"),
    "rows of several lengths": (lambda: torch.nested.nested_tensor([torch.zeros(3, 5)]), "a Tensor nested of"),
    "floats up to 255": (lambda: PIXELS.astype(float), r"astype\('uint8'\)"),
    "floats from -1 to 1": (lambda: PIXELS / 127.5 - 1, "normalised already"),
    "whole numbers of 64 bits": (lambda: PIXELS.astype(int), "uint8, uint16 or floats"),
    "two channels": (lambda: PIXELS[..., :2], "1, 3 or 4 channels"),
    "five axes": (lambda: PIXELS[None, None], "1, 3 or 4 channels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_says_what_to_give(kind: str) -> None:
    made, told = REFUSED[kind]
    with pytest.raises(InputError, match=told) as caught:
        PREPARE(made())
    assert len(str(caught.value)) < 300


FORMS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "a palette": ("x.gif", lambda path: IMAGE.quantize(256).save(path)),
    "the first frame of a film": (
        "x.webp",
        lambda path: IMAGE.save(path, save_all=True, append_images=[IMAGE.rotate(180)], lossless=True),
    ),
    "inks": ("x.jpg", lambda path: IMAGE.convert("CMYK").save(path, quality=100)),
    "one pixel": ("x.png", lambda path: Image.new("RGB", (1, 1), "red").save(path)),
}


@pytest.mark.parametrize("kind", FORMS)
def test_forms_of_files(kind: str) -> None:
    name, save = FORMS[kind]
    save(name)
    with Image.open(name) as shown:
        expected = PREPARE(shown.convert("RGB"))
    assert torch.equal(PREPARE(name), expected)


def test_transparency_of_a_palette_lies_on_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save("x.png", transparency=1)
    assert torch.equal(PREPARE("x.png"), PREPARE(Image.new("RGB", (8, 8), "white")))


REFERENCES: dict[str, str] = {
    "https://huggingface.co/google/vit-base-patch16-224/tree/main": "Did you mean hf:google/vit-base-patch16-224?",
    "hf:https://huggingface.co/google/vit-base-patch16-224": "Did you mean hf:google/vit-base-patch16-224?",
    "https://example.com/model.pth": "is an address",
    "TOY:digits": "Did you mean toy?",
    "toy:DIGITS": "Did you mean digits",
    "toy:digits/": "Did you mean digits",
    "digits": "Did you mean toy:digits",
    "./nowhere": "There is nothing at ./nowhere.",
    "a.png": "is a file.",
    "": "is not a reference",
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_references_that_are_nearly_right(reference: str) -> None:
    with pytest.raises(UnknownName) as caught:
        prisma.load(reference)
    assert REFERENCES[reference] in str(caught.value)


@pytest.mark.parametrize("reference", [" toy:digits", "toy:digits\n", "toy: digits"])
def test_spaces_around_a_reference_are_no_part_of_it(reference: str) -> None:
    assert prisma.load(reference).reference == "toy:digits"


def test_names_of_open_clip_in_openais_form() -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(PrismaError, match=r"Did you mean ViT-B-32"):
        prisma.load("open_clip:ViT-B/32")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", float, np.float32])
def test_dtypes_by_other_names(dtype: Any) -> None:
    with pytest.raises(InputError, match=r"torch\.float16 or torch\.bfloat16"):
        prisma.load("toy:digits", dtype=dtype)
