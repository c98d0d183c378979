"""The examples in the docstrings of the core and of the toys run and print what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import prisma_core as prisma


def modules() -> Iterator[str]:
    for package in ("prisma_core", "prisma_toy"):
        path = importlib.import_module(package).__path__
        names = (each.name for each in pkgutil.walk_packages(path, f"{package}."))
        yield from (name for name in names if not name.endswith("__main__"))


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What examples call by name: a model on an image, its cache, and a library's model of the same kind."""
    timm = pytest.importorskip("timm")
    from prisma_toy import sample_scene

    model = prisma.load("toy:scenes-cls")
    image = model.preprocess(sample_scene(0).image)
    upstream = timm.create_model("vit_tiny_patch16_224", depth=1)
    cache = model.run_with_cache(image)[1]
    return {
        "torch": torch,
        "timm": timm,
        "prisma": prisma,
        "model": model,
        "image": image,
        "cache": cache,
        "upstream": upstream,
    }


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_core_file_run(
    name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs=dict(names)).failed == 0


@pytest.mark.parametrize(
    "place",
    [
        "load", "adapt", "export", "save", "ActivationCache", "Result", "Result.sel", "Result.top", "TokenLayout.grid",
        "HookedModel.run_with_cache", "HookedModel.run_with_hooks", "HookedModel.hooks", "HookedModel.caching",
        "HookedDual.classify",
    ],
)  # fmt: skip
def test_what_everybody_calls_has_an_example(place: str) -> None:
    value: Any = prisma
    for part in place.split("."):
        value = getattr(value, part)
    assert ">>>" in (value.__doc__ or "")
