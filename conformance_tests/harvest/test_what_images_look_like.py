"""Images that look different have different hashes; labels and searches are told apart by what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from prisma_harvest import harvest, open_data, open_harvest, top_examples
from prisma_harvest.items import content_hash, item_of, plain
from torch.utils.data import DataLoader

from prisma_core import HookedViT, InputError, LoadError

NAME = ("resid_post", 1)


def indices() -> Image.Image:
    return Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))


def colours(shift: int) -> Image.Image:
    image = indices().convert("P")
    image.putpalette([(value * 3 + shift) % 256 for value in range(768)])
    return image


def transparent(level: int) -> Image.Image:
    image = indices()
    image.info["transparency"] = level
    return image


def turned(orientation: int) -> Image.Image:
    image = indices()
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return image


@pytest.mark.parametrize("make", [colours, transparent, turned])
def test_images_of_the_same_numbers_that_look_different(model: HookedViT, tmp_path: Path, make: Any) -> None:
    one, two = make(3), make(6)
    assert not torch.equal(model.preprocess(one), model.preprocess(two))
    assert content_hash(one) != content_hash(two)
    assert content_hash(one) == content_hash(make(3))
    acts = [harvest(model, [each], NAME, out=tmp_path, dtype="float32") for each in (one, two)]
    assert acts[0].path != acts[1].path
    assert not torch.equal(acts[0].example(0, NAME), acts[1].example(0, NAME))


def test_labels_that_files_hold() -> None:
    assert plain(b"cat") == plain(np.bytes_(b"cat")) == "cat"
    assert plain("half \ud83d") == "half ?"
    assert plain("caf\udce9") == "caf\udce9"  # a byte of a file name, which is written as it was
    assert item_of({"image": b"", "path": "half \ud83d"}).path == "half ?"


def test_images_that_datasets_does_not_decode(photos: Path) -> None:
    path = next(photos.rglob("*.png"))
    for image in ({"bytes": None, "path": str(path)}, {"bytes": path.read_bytes(), "path": None}):
        item = item_of({"image": image, "label": 1})
        assert content_hash(item.image) == content_hash(path), image


def test_a_loader_is_no_data_set() -> None:
    loader = DataLoader([torch.zeros(3, 6, 6)] * 4, batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"DataLoader.*loader\.dataset"):
        open_data(loader)


def test_searches_of_harvests_in_folders_of_one_name(model: HookedViT, tmp_path: Path) -> None:
    for seed in range(2):
        images = list(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        acts = harvest(model, images, NAME, out=tmp_path / "out", preprocess=None, batch=4)
        (tmp_path / str(seed)).mkdir()
        acts.path.rename(tmp_path / str(seed) / "acts")
    one, two = (open_harvest(tmp_path / str(seed) / "acts") for seed in range(2))
    assert not torch.equal(top_examples(one, NAME, k=2).values, top_examples(two, NAME, k=2).values)
    top_examples(one, NAME, k=2, resume=tmp_path / "top.safetensors")
    with pytest.raises(LoadError, match="another search"):
        top_examples(two, NAME, k=2, resume=tmp_path / "top.safetensors")


def test_directions_that_are_not_finite_are_named(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    acts = harvest(model, photos, NAME, out=tmp_path)
    width = acts.point(NAME).shape[-1]
    with pytest.raises(InputError, match=r"directions.*NaN"):
        top_examples(acts, NAME, directions=torch.full((2, width), torch.nan))
