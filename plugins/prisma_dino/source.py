"""The source ``dino:``: Meta's own files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prisma_core.plugin import Loaded, ModelInfo, Pixels, Preprocess, Source, read_options
from prisma_dino import state
from prisma_dino.meta import MetaViT

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoSource(Source):
    """``dino:FILE``: a state dict of DINO, DINOv2 or DINOv3 as Meta publishes them, or a checkpoint of training.

    Options: ``heads``, ``eps`` and ``image_size`` where the file's shapes do not say, ``key`` for which network of a
    checkpoint (default the teacher), ``mean`` and ``std`` of images where those are not ImageNet's.
    """

    name = "dino"

    def load(self, rest: str, *, pretrained: bool = True, **options: Any) -> Loaded:
        settings = read_options(state.Options, "dino:", options)
        model = state.build(state.read(rest, settings.key), rest, settings)
        pixels = settings.normalisation(rest, model.patch_embed.proj.in_channels, (MEAN, STD))
        return Loaded(model, pixels and preprocess(model, pixels, native=settings.image_size is not None))

    def models(self) -> Iterator[ModelInfo]:
        return iter(())  # whatever files there are


def preprocess(model: MetaViT, pixels: Pixels = (MEAN, STD), *, native: bool = False) -> Preprocess:
    """Return Meta's own preprocessing for evaluation: 256 pixels, of which the middle 224 are seen.

    A model whose patches do not divide 224, or whose native size was asked for, gets that size.
    """
    patch, (mean, std) = model.patch_embed.proj.kernel_size, pixels
    if not native and 224 % patch[0] == 0 and 224 % patch[1] == 0:
        return Preprocess(size=(224, 224), resize="shortest", crop=224 / 256, mean=mean, std=std)
    size = (model.grid[0] * patch[0], model.grid[1] * patch[1])
    return Preprocess(size=size, resize="shortest", mean=mean, std=std)
