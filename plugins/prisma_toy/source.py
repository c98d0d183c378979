"""The source ``toy:``: models trained with ``prisma train`` that come with the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image, fromarray
from torch import Tensor

import prisma_core as prisma
from prisma_core import InputError, UnknownName, ZooModel
from prisma_core.plugin import Loaded, ModelInfo, Seed, Source, checked, read_json, read_text, suggest
from prisma_toy import checkpoints, fetch
from prisma_toy.model import draw_weights
from prisma_toy.scenes import sample_scene
from prisma_toy.task import Task
from prisma_toy.tasks import task
from prisma_toy.words import Words

WEIGHTS = Path(__file__).parent / "weights"


def bundled() -> dict[str, Path]:
    """Return the folders of the models in the package by name."""
    return {path.parent.name: path.parent for path in sorted(WEIGHTS.glob("*/model.safetensors"))}


@checked
def series(name: str) -> dict[int, Path]:
    """Return the folders of the checkpoints that come with a model, by step, the model itself last; none for most.

    Raises:
        UnknownName: there is no such model.

    >>> from prisma_toy import series
    >>> prisma.load(f"toy:motion@{min(series('motion'))}").labels[0]
    '➡ right'
    """
    folder = _folder(name)
    steps = {int(path.name.removeprefix("step-")): path for path in folder.glob(f"{checkpoints.CHECKPOINTS}/step-*")}
    if steps:
        steps[read_json(folder / checkpoints.CONFIG)["steps"]] = folder
    return dict(sorted(steps.items()))


@checked
def training_log(name: str) -> list[dict[str, float]]:
    """Return the log of a bundled model's training, where it comes with one: ``step``, ``loss`` and ``score`` a row.

    The score is the task's measure over the batch of that step.

    Raises:
        UnknownName: there is no such model.
    """
    return list(checkpoints.log_rows(_folder(name)))


def _folder(name: str) -> Path:
    folders = bundled()
    if name not in folders:
        raise UnknownName(
            f"No toy model {name!r}.{suggest(name, folders)} There are {', '.join(folders)}; and toy:FILE.pth and "
            f"toy:{fetch.PREFIX}OWNER/NAME for what the Prisma project published."
        )
    return folders[name]


class ToySource(Source):
    """``toy:NAME``: small trained transformers, hooked from the first training step; no download.

    ``toy:NAME@STEP`` is a checkpoint of a model that comes with a series of them.
    ``toy:FILE.pth`` and ``toy:published/OWNER/NAME`` are what the Prisma project published (see ``fetch.load``).
    """

    name = "toy"

    def load(self, rest: str, **options: Any) -> Loaded:
        if fetch.is_published(rest):
            return fetch.load(rest, **options)
        pretrained = options.pop("pretrained", True)
        if options:
            raise InputError(f"toy: models take no option but pretrained, got {', '.join(options)}.")
        model = cast(ZooModel, prisma.load(f"file:{_at(rest)}"))
        if not pretrained:
            draw_weights(model, seed=0)
        return Loaded(model, model.preprocess, model.labels, tokenizer=getattr(model, "tokenizer", None))

    def models(self) -> Iterator[ModelInfo]:
        for name, folder in bundled().items():
            steps = [f"@{step}" for step in series(name)]
            more = f" Checkpoints: {', '.join(steps)}." if steps else ""
            yield ModelInfo(f"toy:{name}", "toy", True, card_title(folder) + more)

    def checkpoints(self, rest: str) -> dict[int, str]:
        name = rest.partition("@")[0]
        return {step: f"{self.name}:{name}@{step}" for step in series(name)} if name in bundled() else {}

    def sample(self, rest: str, seed: Seed = 0) -> Image | list[Image]:
        """Return an image as the model was trained on, or the frames of a video; a scene for models that are none."""
        folders, name = bundled(), rest.partition("@")[0]
        facts = read_json(folders[name] / checkpoints.CONFIG) if name in folders else {}
        data = facts.get("data", "scenes")
        if data == "scenes":
            return sample_scene(seed + 2).image  # the first one to be seen has two shapes unlike each other
        return _sample(task(data), seed)

    def save_processor(self, processor: Words, folder: Path) -> None:
        processor.save_pretrained(folder)

    def load_processor(self, folder: Path) -> Words:
        return Words.from_pretrained(folder)


def _at(reference: str) -> Path:
    """Return the folder of ``NAME`` or ``NAME@STEP``."""
    name, at, step = reference.partition("@")
    if not at:
        return _folder(name)
    steps = {str(number): path for number, path in series(name).items()}
    if step not in steps:
        there = f"they are of steps {', '.join(steps)}" if steps else "it comes with none"
        raise UnknownName(f"No checkpoint {step!r} of toy:{name}: {there}.")
    return steps[step]


def _sample(one: Task, seed: Seed) -> Image | list[Image]:
    pixels = one.batch(1, "held-out", seed, 0).image[0]
    if one.tubelet is None:
        return _image(pixels)
    return [_image(frame) for frame in pixels]


def _image(pixels: Tensor) -> Image:
    return fromarray((pixels.permute(1, 2, 0).squeeze(2) * 255).round().to(torch.uint8).numpy())


def card_title(folder: Path) -> str:
    """Return the first paragraph of a model's card, without the heading."""
    lines = read_text(folder / "card.md").splitlines()
    return next((line for line in lines if line and not line.startswith("#")), "")
