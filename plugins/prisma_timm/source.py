"""The source ``timm:``: models by name, pretrained from the hub by timm's own loader, or from a local checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prisma_core.errors import UnknownName, suggest
from prisma_core.preprocess import Preprocess
from prisma_core.sources import Loaded, ModelInfo, Source


class TimmSource(Source):
    """``timm:NAME``, ``timm:NAME.TAG``, ``timm:NAME@CHECKPOINT``."""

    name = "timm"
    library = "timm"
    install = 'pip install "prisma[timm]"'

    def load(self, rest: str, *, pretrained: bool = True, **options: Any) -> Loaded:
        import timm
        from timm.data import resolve_model_data_config

        name, _, checkpoint = rest.partition("@")
        if not timm.is_model(name):
            raise UnknownName(f"timm has no model {name!r}.{suggest(name, timm.list_models())}")
        model = timm.create_model(
            name, pretrained=pretrained and not checkpoint, checkpoint_path=checkpoint or None, **options
        )
        return Loaded(model.eval(), _preprocess(resolve_model_data_config(model)))

    def models(self) -> Iterator[ModelInfo]:
        import timm

        for name in timm.list_models():
            yield ModelInfo(f"timm:{name}", "", timm.models.is_model_pretrained(name))


def _preprocess(config: dict[str, Any]) -> Preprocess:
    return Preprocess(
        size=tuple(config["input_size"][1:]),
        crop=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
