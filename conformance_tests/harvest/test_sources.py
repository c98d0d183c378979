"""Data of every kind give the same activations as the images themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photo_data import Map, images, tar
from PIL import Image
from prisma_harvest import Pass, harvest, open_data

from prisma_core import HookedViT, InputError, ModelSpec, TokenLayout
from prisma_core.plugin import EmbedSpec, Preprocess, VideoPreprocess

NAME = "blocks.1.hook_resid_post"


def expected(model: HookedViT, folder: Path) -> torch.Tensor:
    pixels = torch.cat([model.preprocess(path) for path in images(folder)]).double()
    return torch.cat([model.run_with_cache(part, names=[NAME])[1][NAME] for part in pixels.split(4)]).float()


def read(model: HookedViT, data: Any, out: Path, **options: Any) -> tuple[torch.Tensor, list[Any], list[Any]]:
    acts = harvest(model, data, NAME, out=out, batch=4, dtype="float32", **options)
    lines = list(acts.examples())
    return acts.read(NAME, 0, len(acts)), [line["label"] for line in lines], [line["path"] for line in lines]


class Again:
    """An iterable that can be read again and again."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __iter__(self) -> Iterator[Any]:
        return (np.asarray(Image.open(path)) for path in images(self.folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_lists_data_sets_and_streams(model: HookedViT, photos: Path, tmp_path: Path, workers: int) -> None:
    paths = images(photos)
    kinds: dict[str, tuple[Any, Any]] = {
        "paths": (paths, None),
        "texts": ([str(path) for path in paths], None),
        "pairs": ([(path, index) for index, path in enumerate(paths)], lambda index: index),
        "pillow": ([Image.open(path) for path in paths], None),
        "bytes": ([path.read_bytes() for path in paths], None),
        "a torch data set": (Map(photos), lambda index: index % 7),
        "an iterable": (Again(photos), None),
        "a generator": (((Image.open(path), path.parent.name) for path in paths), lambda i: paths[i].parent.name),
        "mappings": ([{"img": path, "fine_label": "x", "id": 3} for path in paths], lambda index: "x"),
    }
    truth = expected(model, photos)
    for kind, (data, label) in kinds.items():
        values, labels, _ = read(model, data, tmp_path / kind, workers=workers)
        assert torch.equal(values, truth), kind
        assert labels == [None if label is None else label(index) for index in range(26)], kind


def test_a_set_of_datasets(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"photo": [str(path) for path in images(photos)], "label": list(range(26))})
    data = data.cast_column("photo", datasets.Image())
    with pytest.raises(InputError, match=r"photo.*image_column="):
        read(model, data, tmp_path / "out")
    values, labels, _ = read(model, data, tmp_path / "out", image_column="photo", workers=0)
    assert torch.equal(values, expected(model, photos))
    assert labels == list(range(26))
    stream = data.to_iterable_dataset(num_shards=1)
    values, _, _ = read(model, stream, tmp_path / "stream", image_column="photo", workers=0)
    assert torch.equal(values, expected(model, photos))


def test_webdataset_shards(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    paths = images(photos)
    for shard in range(3):
        members: dict[str, bytes] = {}
        for index in range(shard * 10, min(26, shard * 10 + 10)):
            members |= {f"a/{index:03d}.png": paths[index].read_bytes(), f"a/{index:03d}.cls": str(index % 4).encode()}
        tar(tmp_path / "shards" / f"train-{shard:02d}.tar", members)
    truth = expected(model, photos)
    folder = tmp_path / "shards"
    ways = [
        folder,
        folder / "train-{00..02}.tar",
        str(folder / "*.tar"),
        [folder / f"train-{i:02d}.tar" for i in range(3)],
    ]
    for at, data in enumerate(ways):
        values, labels, names = read(model, data, tmp_path / f"out{at}")
        assert torch.equal(values, truth)
        assert labels == [index % 4 for index in range(26)]
        assert names[11] == "train-01.tar/a/011"
    library = pytest.importorskip("webdataset")  # the library groups the members in the same way
    theirs = list(library.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False))
    assert [one["__key__"] for one in theirs] == [name.partition("/")[2] for name in names]
    values, labels, _ = read(model, theirs, tmp_path / "library")
    assert torch.equal(values, truth)
    assert labels == [index % 4 for index in range(26)]
    with pytest.raises(InputError, match=r"No tar shard at .*train-09\.tar"):
        open_data(str(folder / "train-{02..09}.tar").replace("02..", "09.."))
    (tmp_path / "broken.tar").write_bytes(b"nothing of a tar" * 100)
    with pytest.raises(InputError, match=r"broken\.tar is no uncompressed tar"):
        open_data(tmp_path / "broken.tar")


def test_labels_of_tar_shards_from_json(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    path = images(photos)[0]
    tar(tmp_path / "one.tar", {"x.png": path.read_bytes(), "x.json": b'{"label": "cat", "id": 7}'})
    assert read(model, tmp_path / "one.tar", tmp_path / "out")[1] == ["cat"]


def test_videos(make: Callable[..., HookedViT], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    facts = make(cls=1).spec.model_dump() | {
        "image_size": (8, 8),
        "embed": EmbedSpec(patch=(4, 4), tubelet=2).model_dump(),
        "layout": TokenLayout(cls=1, frames=3, rows=2, columns=2).model_dump(),
    }
    model = HookedViT(ModelSpec.model_validate(facts)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.preprocess = VideoPreprocess(frames=6, each=Preprocess(size=(8, 8)))
    paths = [tmp_path / "films" / f"{index}.mp4" for index in range(3)]
    paths[0].parent.mkdir()
    for index, path in enumerate(paths):
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            for frame in range(9):
                pixels = np.random.default_rng(10 * index + frame).integers(0, 256, (32, 32, 3)).astype(np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
    acts = harvest(model, tmp_path / "films", NAME, out=tmp_path / "out", batch=2, dtype="float32", pos="frame 1")
    pixels = torch.cat([model.preprocess(path) for path in paths])
    parts = [model.run_with_cache(part, names=[NAME], pos="frame 1")[1][NAME] for part in pixels.split(2)]
    assert torch.equal(acts.read(NAME, 0, 3), torch.cat(parts).float())
    assert acts.tokens_of(acts.names[0]) == ["f1r0c0", "f1r0c1", "f1r1c0", "f1r1c1"]
    tar(tmp_path / "films.tar", {path.name: path.read_bytes() for path in paths})
    shards = harvest(model, tmp_path / "films.tar", NAME, out=tmp_path / "out", batch=2, dtype="float32", pos="frame 1")
    assert torch.equal(shards.read(NAME, 0, 3), acts.read(NAME, 0, 3))
    tar(tmp_path / "text.tar", {"0.mp4": b"neither"})
    with pytest.raises(InputError, match="7 bytes are neither an image nor a video"):
        Pass(model, tmp_path / "text.tar", NAME)


def test_data_that_cannot_be_harvested(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    class Random(Map):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(6, 6, 3)

    with pytest.raises(InputError, match="random augmentation"):
        open_data(Random(photos))
    ready = [torch.randn(3, 6, 6, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(InputError, match=r"channels first.*preprocess=None"):
        harvest(model, ready, NAME, out=tmp_path / "out")
    generator = iter([(one, 0) for one in ready])
    Pass(model, generator, NAME, preprocess=None)
    with pytest.raises(InputError, match="the iterable is empty"):
        Pass(model, iter([]), NAME, preprocess=None)
    with pytest.raises(InputError, match=r"different shapes: \[\(3, 6, 6\), \(3, 6, 8\)\]"):
        harvest(model, [*ready, torch.randn(3, 6, 8)], NAME, out=tmp_path / "out", preprocess=None, workers=0)
    with pytest.raises(InputError, match="got 7"):
        harvest(model, 7, NAME, out=tmp_path / "out")
    (photos / "film.mp4").write_bytes(b"film")
    with pytest.raises(InputError, match="images and videos"):
        open_data(photos)


def test_a_limit_takes_the_first(model: HookedViT, photos: Path, tmp_path: Path) -> None:
    truth = expected(model, photos)
    for at, data in enumerate((photos, images(photos), Map(photos), Again(photos))):
        values, *_ = read(model, data, tmp_path / str(at), limit=9)
        assert torch.equal(values[:8], truth[:8])
        assert len(values) == 9


def test_labels_are_what_json_holds_whatever_numbers_they_are(model: HookedViT, tmp_path: Path) -> None:
    """Numbers of numpy and torch in lists; NaN, with which tables mark a missing label, in a stream that is resumed."""
    images = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = [[np.int64(1), torch.tensor(2)], (np.float32(0.5), "x"), float("nan"), np.float64("nan"), math.inf, True]
    how: dict[str, Any] = {"preprocess": None, "batch": 2, "workers": 0, "out": tmp_path}

    def stream() -> Any:
        return ((image, label) for image, label in zip(images, labels, strict=True))

    acts = harvest(model, stream(), ("resid_post", 0), **how)
    assert [line["label"] for line in acts.examples()] == [[1, 2], [0.5, "x"], None, None, "inf", True]
    assert "NaN" not in (acts.path / "examples.jsonl").read_text(encoding="utf-8")
    assert harvest(model, stream(), ("resid_post", 0), **how).path == acts.path
