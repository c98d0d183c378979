"""The weights beside a configuration, looked at before transformers reads them, which makes real numbers of any."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prisma_core.plugin import LoadError, check_claims, check_layers, read_json, read_outline
from prisma_hf.making import fresh
from prisma_hf.places import CONFIG, WEIGHTS


def held_in(folder: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a folder's weights without their numbers, or None where transformers finds none either.

    Raises:
        LoadError: a file cannot be read safely.
    """
    main = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if main is None:
        return None
    names = {main.name} if main.suffix != ".json" else _listed(main)
    held: dict[str, Tensor] = {}
    for file in sorted(names):
        part = read_outline(folder / file)
        if twice := sorted(held.keys() & part.keys()):
            raise LoadError(f"{folder / file} holds {twice[0]}, and another of the files too: which one counts?")
        held |= part
    return held


def _listed(index: Path) -> set[str]:
    try:
        names = read_json(index)["weight_map"].values()
        return {Path(name).name for name in names}  # they lie beside it
    except (KeyError, AttributeError, TypeError) as error:
        raise LoadError(f"{index} is no list of files of weights: {error}") from error


def check_configuration(folder: Path, held: dict[str, Tensor] | None, where: object) -> None:
    """Refuse a configuration of quantised weights, or of more layers than there are: it may make a list of them.

    Raises:
        LoadError: with the field.
    """
    try:
        config = read_json(folder / CONFIG)
    except LoadError:  # transformers says so itself
        return
    if held is not None and (quantised := config.get("quantization_config")):
        how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise LoadError(f"{where} holds quantised weights ({how}), which Prisma does not read: load the original ones.")
    check_layers(config, held, where)


def check_outline(kind: Any, config: Any, held: dict[str, Tensor] | None, where: object) -> None:
    """Refuse a model that is not what its files hold, before memory is asked for.

    Raises:
        LoadError: it is far larger than its weights or this machine, or the weights are no real numbers.
    """
    try:
        with torch.device("meta"):
            outline = fresh(str(where), kind, copy.deepcopy(config), {})
    except LoadError:  # it needs an option; or nothing can be made of it, which is said then
        return
    check_claims(outline, held, where)
    if held is not None:
        _check_kinds(outline, held, where)


def _check_kinds(model: nn.Module, held: dict[str, Tensor], where: object) -> None:
    # The model tells which tensors are whole numbers, such as indices.
    whole = {name.rpartition(".")[2] for name, one in model.named_buffers() if not one.is_floating_point()}
    others = [
        f"{name} ({str(one.dtype).removeprefix('torch.')})"
        for name, one in held.items()
        if (one.itemsize < 2 or not one.is_floating_point())
        and (one.is_complex() or name.rpartition(".")[2] not in whole)
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise LoadError(
            f"{where} holds weights that are no real numbers: {', '.join(others[:3])}{more}. Quantised weights are "
            "dequantised first."
        )
