"""The source ``toy:``: models trained with ``prisma train`` that come with the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image, fromarray

import prisma_core as prisma
from prisma_core import HookedViT, InputError, UnknownName
from prisma_core.plugin import Loaded, ModelInfo, Source, suggest
from prisma_toy import fetch
from prisma_toy.checkpoints import CONFIG
from prisma_toy.model import draw_weights
from prisma_toy.scenes import sample_scene
from prisma_toy.tasks import task

WEIGHTS = Path(__file__).parent / "weights"


def bundled() -> dict[str, Path]:
    """Return the folders of the models in the package by name."""
    return {path.parent.name: path.parent for path in sorted(WEIGHTS.glob("*/model.safetensors"))}


class ToySource(Source):
    """``toy:NAME``: small trained vision transformers, hooked from the first training step; no download.

    ``toy:FILE.pth`` and ``toy:published/OWNER/NAME`` are what the Prisma project published (see ``fetch.load``).
    """

    name = "toy"

    def load(self, rest: str, **options: Any) -> Loaded:
        if fetch.is_published(rest):
            return fetch.load(rest, **options)
        found = bundled()
        if rest not in found:
            raise UnknownName(
                f"No toy model {rest!r}.{suggest(rest, found)} There are {', '.join(found)}; and toy:FILE.pth and "
                f"toy:{fetch.PREFIX}OWNER/NAME for what the Prisma project published."
            )
        pretrained = options.pop("pretrained", True)
        if options:
            raise InputError(f"toy: models take no option but pretrained, got {', '.join(options)}.")
        model = cast(HookedViT, prisma.load(f"file:{found[rest]}"))
        if not pretrained:
            draw_weights(model, seed=0)
        return Loaded(model, model.preprocess, model.labels)

    def models(self) -> Iterator[ModelInfo]:
        for name, folder in bundled().items():
            yield ModelInfo(f"toy:{name}", "toy", True, card_title(folder))

    def sample(self, rest: str, seed: int = 0) -> Image:
        """Return a picture as the model was trained on, or a scene with two shapes."""
        found = bundled()
        facts = json.loads((found[rest] / CONFIG).read_text(encoding="utf-8")) if rest in found else {}
        data = facts.get("data", "scenes")
        if data == "scenes":
            return sample_scene(seed + 2).image  # the first one to be seen has two shapes unlike each other
        pixels = task(data).batch(1, "held-out", seed, 0).image[0, 0]
        return fromarray((pixels * 255).round().to(torch.uint8).numpy())


def card_title(folder: Path) -> str:
    """Return the first paragraph of a model's card, without the heading."""
    lines = (folder / "card.md").read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line and not line.startswith("#")), "")
