"""A stranger's way from images to tensors: what it gets for free, and how it goes with a saved model."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prisma_conformance.randomise import randomise
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError, hookimpl
from prisma_core import host as hosting
from prisma_core.contract.source import Loaded, ModelInfo, Source
from prisma_core.host import Host
from prisma_core.inputs import ImagePreprocess, Preprocess, fingerprint, restored
from prisma_core.saving.processors import ProcessorFolder
from prisma_core.spec import ModelSpec, NormSpec
from prisma_core.transformer import HookedViT


class Halved(ImagePreprocess):
    """Every other pixel, blue first, less a number."""

    channels = 3

    def __init__(self, less: float):
        self.less = less

    def prepared(self, image: Image.Image) -> Tensor:
        if image.width < 4:
            raise InputError("Too small.")
        pixels = torch.from_numpy(np.array(image)[::2, ::2, ::-1].copy()).permute(2, 0, 1)
        return pixels / 255 - self.less

    def seen(self, image: Image.Image, side: int = 0) -> Image.Image:
        return image.reduce(2)

    def denormalise(self, pixels: Tensor) -> Tensor:
        return restored(pixels, (self.less,) * 3, (1.0,) * 3, "bgr")


class HalvingSource(Source):
    name = "halves"

    def load(self, rest: str, **options: Any) -> Loaded:
        raise NotImplementedError  # it only opens images again

    def models(self) -> Iterator[ModelInfo]:
        yield from ()

    def save_processor(self, processor: Any, folder: Path) -> None:
        (folder / "less.json").write_text(json.dumps(processor.less))

    def load_processor(self, folder: Path) -> Halved:
        return Halved(json.loads((folder / "less.json").read_text()))


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes these sources the only ones installed."""

    def install(*sources: Source) -> None:
        module = types.ModuleType("plugin_for_tests_of_images")
        module.prisma_sources = hookimpl(lambda: list(sources))  # type: ignore[attr-defined]
        module.prisma_sources.__name__ = "prisma_sources"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(hosting, "_host", Host([EntryPoint("stranger", module.__name__, "prisma")]))

    return install


@pytest.fixture
def model() -> HookedViT:
    facts = {"norm": NormSpec(eps=1e-3), "scale": 0.4, "d_mlp": 20, "ln_final": None, "n_classes": None}
    spec = ModelSpec.plain(layers=1, image=8, cls=0, pool="avg", **facts)
    return randomise(HookedViT(spec), torch.Generator().manual_seed(0)).eval()  # type: ignore[return-value]


def image_of(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype("uint8"))


def test_images_of_any_kind_and_lists_of_them(tmp_path: Path) -> None:
    ours, image = Halved(0.25), image_of(12, 16)
    image.save(tmp_path / "a.png")
    made = ours(tmp_path / "a.png")
    assert made.shape == (1, 3, 8, 6)
    assert torch.equal(ours(np.asarray(image)), made)
    assert torch.equal(ours([image, str(tmp_path / "a.png")]), made.repeat(2, 1, 1, 1))
    assert torch.allclose(ours.denormalise(made)[0, 0] * 255, torch.tensor(np.asarray(image)[::2, ::2, 0]).float())
    with pytest.raises(InputError, match=r"height x width: 8 x 6, 3 x 4.*one by one"):
        ours([image, image_of(8, 6)])
    with pytest.raises(InputError, match="at least one"):
        ours([])
    with pytest.raises(InputError, match="No image at"):
        ours("nowhere.png")


def test_what_is_tried_tells_forms_apart_and_refusals_too() -> None:
    def refuses(image: Image.Image) -> Tensor:
        raise InputError(f"{image.size[0]} is too wide")

    assert not torch.equal(fingerprint(Halved(0.25)), fingerprint(Halved(0.5)))
    assert torch.equal(fingerprint(refuses), fingerprint(refuses))
    data = Preprocess(size=(8, 8))
    assert not torch.equal(fingerprint(data), fingerprint(data.model_copy(update={"order": "bgr"})))


@torch.no_grad()
def test_a_strangers_form_goes_with_a_saved_model(model: HookedViT, only: Callable[..., None], tmp_path: Path) -> None:
    only(HalvingSource())
    model.preprocess = Halved(0.25)
    back: Any = prisma.load(f"file:{prisma.save(model, tmp_path)}")
    assert isinstance(vars(back)["preprocess"], ProcessorFolder)
    image = image_of(16, 16)
    assert torch.equal(back(back.preprocess(image)), model(model.preprocess(image)))
    assert back.preprocess.seen(image).size == (8, 8)
    model.preprocess = Preprocess(size=(8, 8), order="bgr")
    assert prisma.load(f"file:{prisma.save(model, tmp_path)}").preprocess == model.preprocess
    assert not (tmp_path / "companions").exists()


def test_what_no_source_saves_is_said_to_be_lost(model: HookedViT, only: Callable[..., None], tmp_path: Path) -> None:
    only()
    model.preprocess = Halved(0.25)
    with pytest.warns(UserWarning, match=r"The preprocess is not saved with the model: no source.*Halved"):
        prisma.save(model, tmp_path)
    with pytest.raises(InputError, match=r"was not saved with this model.*Set model\.preprocess"):
        prisma.load(f"file:{tmp_path}").preprocess(image_of(16, 16))
