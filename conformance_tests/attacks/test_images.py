"""Images that are programs, or that ask for more than they hold."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import ghostscript, postscript
from PIL import EpsImagePlugin, Image
from pydantic import ValidationError

from prisma_core import InputError
from prisma_core.inputs import Preprocess, open_image
from prisma_core.inputs.opening import FORMATS


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that Ghostscript would have made."""
    programs = ghostscript(tmp_path / "programs", tmp_path / "ran")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return tmp_path / "ran"


@pytest.mark.skipif(os.name == "nt", reason="the program in the place of Ghostscript is a shell's")
@pytest.mark.parametrize("name", ["cat.eps", "cat.jpg", "cat.png", "cat"])
def test_postscript_under_any_name(name: str, tmp_path: Path, mark: Path) -> None:
    path = postscript(tmp_path / name)
    with Image.open(path) as opened, pytest.raises(subprocess.CalledProcessError):
        opened.load()
    assert mark.exists()  # Pillow by itself
    mark.unlink()
    for given in (path, str(path)):
        with pytest.raises(InputError, match=rf"{name}' is no image that Pillow may read: expected PNG, JPEG.*as PNG"):
            Preprocess(size=(8, 8))(given)
    with Image.open(path) as opened, pytest.raises(InputError, match="a file of EPS, which is not decoded here"):
        open_image(opened)
    assert not mark.exists()


def test_formats_that_are_read() -> None:
    """No stub that calls a program, a handler of somebody's or a reader of other files."""
    assert not {"EPS", "PDF", "WMF", "BUFR", "GRIB", "HDF5", "FITS", "MPEG", "IPTC"} & set(FORMATS)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO"])
def test_images_of_every_day_are_read_under_any_name(form: str, tmp_path: Path) -> None:
    image = Image.effect_mandelbrot((16, 16), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    image.save(tmp_path / "image.any", format=form)
    opened = open_image(tmp_path / "image.any")
    assert (opened.size, opened.mode) == ((16, 16), "RGB")
    with Image.open(tmp_path / "image.any") as again:
        assert opened.tobytes() == again.convert("RGB").tobytes() == open_image(again).tobytes()


def png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size, and holds a row of it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60000, 60000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_an_image_that_claims_to_be_large(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(*size))
    with pytest.raises(InputError, match=r"large\.png' is no"):
        open_image(tmp_path / "large.png")


@pytest.mark.parametrize("given", [torch.zeros(1, 20000, 3), Image.new("RGB", (20000, 1))])
def test_a_line_is_not_made_a_square(given: Any) -> None:
    with pytest.raises(InputError, match=r"1 x 20000 would become 16384 x 327680000"):
        Preprocess(size=(16384, 16384))(given)


@pytest.mark.parametrize(
    "settings",
    [{"size": (10**9, 10**9)}, {"size": (0, 8)}, {"size": (-1, 8)}, {"crop": float("nan")}, {"crop": float("inf")}],
)
def test_sizes_that_no_image_has(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Preprocess.model_validate({"size": (8, 8), **settings})
