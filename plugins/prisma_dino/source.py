"""The source ``dino:``: Meta's own files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prisma_core.errors import InputError, suggest
from prisma_core.preprocess import Preprocess
from prisma_core.sources import Loaded, ModelInfo, Source
from prisma_dino import state
from prisma_dino.meta import MetaViT

OPTIONS = ("heads", "eps", "image_size", "key", "mean", "std")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoSource(Source):
    """``dino:FILE``: a state dict of DINO, DINOv2 or DINOv3 as Meta publishes them, or a checkpoint of training.

    Options: ``heads``, ``eps`` and ``image_size`` where the file's shapes do not say, ``key`` for which network of a
    checkpoint (default the teacher), ``mean`` and ``std`` of pictures where those are not ImageNet's.
    """

    name = "dino"

    def load(
        self,
        rest: str,
        *,
        pretrained: bool = True,
        key: str = "teacher",
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
        **options: Any,
    ) -> Loaded:
        if unknown := sorted(set(options) - {"heads", "eps", "image_size"}):
            near = suggest(unknown[0], OPTIONS)
            raise InputError(f"dino: takes the options {', '.join(OPTIONS)}; got {', '.join(unknown)}.{near}")
        model = state.build(state.read(rest, key), rest, **options)
        return Loaded(model, preprocess(model).model_copy(update={"mean": tuple(mean), "std": tuple(std)}))

    def models(self) -> Iterator[ModelInfo]:
        return iter(())  # whatever files there are


def preprocess(model: MetaViT) -> Preprocess:
    """Return Meta's own preprocessing for evaluation: 256 pixels, of which the middle 224 are seen.

    A model whose patches do not divide 224 gets its native size.
    """
    patch = model.patch_embed.proj.kernel_size
    if 224 % patch[0] == 0 and 224 % patch[1] == 0:
        return Preprocess(size=(224, 224), resize="shortest", crop=224 / 256, mean=MEAN, std=STD)
    return Preprocess(size=(model.side * patch[0], model.side * patch[1]), resize="shortest", mean=MEAN, std=STD)
