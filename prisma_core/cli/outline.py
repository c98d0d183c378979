"""A model's facts and shapes without its weights: everything happens on the meta device, which holds no numbers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from prisma_core.errors import InputError, describe
from prisma_core.errors.arguments import number
from prisma_core.hooks.model import HookedModel
from prisma_core.host import installed
from prisma_core.saving.folder import load_folder
from prisma_core.transformer import ZooModel
from prisma_core.zoo import load, reference_of


def outline(reference: str | Path, **options: Any) -> HookedModel:
    """Return the model a reference names on the meta device, without trained weights and without a network call.

    Args:
        reference, options: as for ``load``.

    Raises:
        UnknownName: no such source or model; the nearest are suggested.
        UnsupportedArchitecture: the model has something the canonical transformer cannot represent.
    """
    name, rest = reference_of(reference)
    if name == "file":
        return load_folder(Path(rest), weights=False)
    if "pretrained" not in inspect.signature(installed().source(name).load).parameters:
        return load(reference, **options).to("meta")
    options = {"pretrained": False, **options}
    try:
        with torch.device("meta"):
            model = load(reference, **options)
    except (NotImplementedError, RuntimeError):  # upstream's constructor looks at numbers, and there are none
        model = load(reference, **options)
    return model.to("meta")


def shapes(model: HookedModel, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shape of every hook point's activation, derived ones too, at the native image size.

    Args:
        model: one whose input an outline can know: it has a ``ModelSpec``.
        batch: how many images.

    Raises:
        InputError: the model has no spec that says what it takes.
    """
    if not isinstance(model, ZooModel):
        raise InputError(f"{describe(model)} has no spec that says what it takes; run it with a cache.")
    number(batch, "how many images", 1)
    place = model.input_like
    with torch.no_grad():
        inputs = [
            x.to(place.device, place.dtype if x.is_floating_point() else None) for x in model.sample_inputs(batch)
        ]
        names = list(model.hook_points())
        _, cache = model.run_with_cache(*inputs, names=names)
    return {name: tuple(cache[name].shape) for name in names}
