"""Data as people have them: linked folders, archives beside their content, damaged bytes, sets that raise."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photo_data import Map, images, tar
from PIL import Image
from prisma_harvest import Pass, harvest, open_data
from prisma_harvest.items import opened
from torch.utils.data import IterableDataset

from prisma_core import HookedViT, InputError
from prisma_core.plugin import open_image

NAME = "blocks.1.hook_resid_post"


def paths_of(data: Any) -> list[str]:
    opened = open_data(data)
    assert opened.get is not None
    return [str(opened.get(at).path) for at in range(opened.n or 0)]


def test_folders_that_are_links_are_read_and_circles_end(photos: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("cats", "dogs"):
        (linked / name).symlink_to(photos / name)
    (linked / "cats again").symlink_to(photos / "cats")
    cats = sorted(path.name for path in (photos / "cats").iterdir())
    (photos / "dogs" / "round").symlink_to(linked)  # a link to what it is in
    (photos / "dogs" / "self").symlink_to(photos / "dogs")
    dogs = sorted(path.name for path in (photos / "dogs").glob("*.png"))
    inside = {"cats": cats, "cats again": cats, "dogs": dogs}
    assert paths_of(linked) == [f"{folder}/{name}" for folder, names in inside.items() for name in names]
    item = open_data(linked).get
    assert item is not None
    assert item(len(cats)).label == "cats again"


def test_a_link_that_leads_nowhere_is_an_image_that_cannot_be_read(
    model: HookedViT, photos: Path, tmp_path: Path
) -> None:
    (photos / "cats" / "lost.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"cats/lost\.png"):
        harvest(model, photos, NAME, out=tmp_path / "out", workers=0)
    acts = harvest(model, photos, NAME, out=tmp_path / "out", workers=0, on_error="skip")
    assert [line["path"] for line in acts.skipped()] == ["cats/lost.png"]
    assert len(acts) == 26


def test_archives_beside_images_are_no_one_kind_of_data(photos: Path, tmp_path: Path) -> None:
    tar(photos / "cats.tar", {"a.png": images(photos)[0].read_bytes()})
    with pytest.raises(InputError, match="images and tar files: give a folder of one kind"):
        open_data(photos)
    shutil.rmtree(photos / "cats")
    shutil.rmtree(photos / "dogs")
    (photos / "README.md").write_text("shards")
    assert open_data(photos).kind == "tar"


def test_a_folder_that_cannot_be_listed_is_an_error(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may list everything, so the refusal is the system's own call, put in its place."""
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("dogs"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"dogs cannot be read: Permission denied"):
        open_data(photos)


class Counted(IterableDataset[Any]):
    """A stream that knows its length, as WebDataset's are with ``with_length``."""

    def __init__(self, folder: Path):
        self.paths = images(folder)

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Any]:
        return (np.asarray(Image.open(path)) for path in self.paths)


def test_a_stream_with_a_length_is_a_stream(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    assert open_data(Counted(photos)).kind == "stream"
    acts, plain = (
        harvest(model, data, NAME, out=tmp_path / "out", batch=4, dtype="float32", workers=0, data_name=name)
        for name, data in (("counted", Counted(photos)), ("list", images(photos)))
    )
    assert torch.equal(acts.read(NAME, 0, 26), plain.read(NAME, 0, 26))


class Raising(Map):
    """A set whose decoder raises what torchvision's, OpenCV's and others do."""

    def __init__(self, folder: Path, error: type[Exception]):
        super().__init__(folder)
        self.error = error

    def __getitem__(self, index: int) -> Any:
        if index % 5 == 3:
            raise self.error("image is truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyError, AttributeError])
def test_whatever_a_set_raises_is_an_image_that_cannot_be_read(
    model: HookedViT, photos: Path, tmp_path: Path, error: type[Exception], workers: int
) -> None:
    how: dict[str, Any] = {"batch": 4, "workers": workers, "out": tmp_path / "out"}
    with pytest.raises(InputError, match=rf"Image 3 .*Raising.__getitem__ raised {error.__name__}.*on_error='skip'"):
        harvest(model, Raising(photos, error), NAME, **how)
    acts = harvest(model, Raising(photos, error), NAME, on_error="skip", **how)
    assert [line["source"] for line in acts.skipped()] == [3, 8, 13, 18, 23]
    table = {"a": [1, 2], "b": [3, 4]}  # as of pandas: a length, and columns by name
    columns = type("Table", (), {"__len__": lambda self: 2, "__getitem__": lambda self, name: table[name]})()
    with pytest.raises(InputError, match=r"Table raised KeyError"):
        Pass(model, columns, NAME)


def encoded(mode: str, form: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_bytes_are_an_image_that_cannot_be_read(tmp_path: Path, form: str) -> None:
    whole = encoded("RGB", form)
    random = np.random.default_rng(1)
    errors = list[str]()
    for _ in range(300):
        damaged = bytearray(whole)
        for at in random.integers(0, min(len(whole), 200), 3):
            damaged[at] = random.integers(0, 256)
        try:
            opened(bytes(damaged))
        except InputError as error:
            errors.append(str(error))
    assert errors
    assert not [error for error in errors if " at 0x" in error]  # addresses are other bytes in the list of each run


def test_bytes_are_opened_as_files_are() -> None:
    """A format whose decoder starts a program stays closed, and transparency lies on white."""
    with pytest.raises(InputError, match="EPS, which is not decoded here"):
        opened(encoded("RGB", "EPS"))
    file = io.BytesIO()
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(file, "PNG")
    assert np.array_equal(np.asarray(opened(file.getvalue())), np.asarray(open_image(clear)))


def test_what_is_skipped_has_the_same_words_each_time(
    model: HookedViT, photos: Path, tmp_path: Path, content: Callable[[Path], dict[str, bytes]]
) -> None:
    members = {f"{at:02d}.png": path.read_bytes() for at, path in enumerate(images(photos)[:4])}
    tar(tmp_path / "one.tar", members | {"02.png": b"no image", "03.png": members["03.png"][:30]})
    runs = [
        harvest(model, tmp_path / "one.tar", NAME, out=tmp_path / out, on_error="skip", workers=0)
        for out in ("first", "second")
    ]
    assert content(runs[0].path) == content(runs[1].path)
    assert len(list(runs[0].skipped())) == 2


def member(name: str, kind: bytes = tarfile.REGTYPE, **facts: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, "x.png"
    for fact, value in facts.items():
        setattr(made, fact, value)
    return made


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (member("x.png"), r"'x\.png' twice"),
        (member("x.PNG"), r"'x\.PNG' twice"),
        (member("./x.png"), ""),
        (member("y.png", tarfile.LNKTYPE), r"'y\.png' as a link, or with gaps"),
        (member("y.png", tarfile.SYMTYPE), r"'y\.png' as a link, or with gaps"),
        (member("y.png", tarfile.FIFOTYPE), r"'y\.png' as a link, or with gaps"),
        (member("y.png", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}), "with gaps"),
    ],
    ids=["twice", "twice by case", "in another folder", "a hard link", "a link", "a pipe", "a file with gaps"],
)
def test_what_a_tar_file_would_lose(other: tarfile.TarInfo, words: str, tmp_path: Path) -> None:
    """Of two files of a name one was read; links were left out; of a file with gaps the bytes stand elsewhere."""
    with tarfile.open(tmp_path / "one.tar", "w", format=tarfile.PAX_FORMAT) as tar_file:
        tar_file.addfile(member("x.png"), io.BytesIO())
        tar_file.addfile(other, io.BytesIO())
    if not words:
        assert open_data(tmp_path / "one.tar").n == 2
        return
    with pytest.raises(InputError, match=words):
        open_data(tmp_path / "one.tar")


def test_labels_that_nest_without_end(model: HookedViT, tmp_path: Path) -> None:
    tar(tmp_path / "one.tar", {"x.png": b"", "x.json": b"[" * 100_000})
    with pytest.raises(InputError, match="its JSON is nested too deeply"):
        harvest(model, tmp_path / "one.tar", NAME, out=tmp_path / "out")


def test_a_range_of_shards_is_read_no_further_than_its_first_gap(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"No tar shard at .*shards-0\.tar"):
        open_data(f"{tmp_path}/shards-{{0..99999999999}}.tar")
