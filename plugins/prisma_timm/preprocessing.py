"""timm's evaluation transform as data."""

from __future__ import annotations

from typing import Any

from prisma_core.plugin import LoadError, Preprocess

RESIZE = {"center": "shortest", "squash": "squash", "border": "longest"}


def preprocess(config: dict[str, Any]) -> Preprocess:
    """Return timm's evaluation transform, given timm's data config.

    Raises:
        LoadError: it does something that ``Preprocess`` does not express.
    """
    if config["crop_mode"] not in RESIZE:
        raise LoadError(f"timm's crop mode {config['crop_mode']!r} is none of {', '.join(RESIZE)}.")
    return Preprocess(
        size=tuple(config["input_size"][1:]),
        resize=RESIZE[config["crop_mode"]],
        crop=config["crop_pct"],
        pad="mean" if config["crop_mode"] == "border" else "black",
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
