"""saev's files (OSU-NLP): a line of JSON, then what ``torch.save`` wrote; of all schemas.

Files without a schema were written by code that takes ``b_dec`` off the input (saev 0.1.0); from schema 1 on nothing is
taken off. saev's own newer loader reads the old ones without it.

Source:
    saev 0.1.0, ``nn.py``; saev, ``nn/modeling.py`` (``dump``, ``load``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prisma_core import LoadError
from prisma_core.plugin import check_regular, parse_json, read_objects
from prisma_sae.coder import CoderFacts, SparseCoder, Tokens
from prisma_sae.formats.files import plain, renamed

NAME = "saev"
LONGEST_LINE = 1 << 20
_ACTIVATIONS = {
    "Relu": ("standard", "relu"),
    "TopK": ("topk", "topk-signed"),
    "BatchTopK": ("batchtopk", "jump-signed"),
}


def recognises(path: Path) -> bool:
    if path.is_dir():
        path = path / "sae.pt"
    if not path.is_file():
        return False
    check_regular(path)
    with path.open("rb") as file:
        return file.read(1) == b"{"


def read(
    path: Path,
    *,
    hook: str | None = None,
    tokens: Tokens | None = None,
    model: str | None = None,
    mean: Tensor | None = None,
    scale: float | None = None,
) -> SparseCoder:
    """Read a file, or the ``sae.pt`` of a folder.

    Args:
        path: the file or folder.
        hook, tokens, model: where it belongs: files do not say it.
        mean, scale: what its training took off activations, and divided them by (``[d_in]`` and a number): files do not
            say it either, and with DINOv2 it was not nothing.

    Raises:
        LoadError: the file is damaged, or of an unknown schema.
    """
    file = path / "sae.pt" if path.is_dir() else path
    header, tensors = _parts(file)
    schema, config = header.get("schema"), header.get("cfg", header)
    name, params = _activation(file, header, config)
    threshold = tensors.pop("activation.threshold", None)
    kind, activation = _ACTIVATIONS[name]
    if threshold is not None:
        tensors["threshold"] = threshold
    elif name == "BatchTopK":
        activation = "topk-signed"  # before schema 5 it was TopK, row by row
    if schema is None:
        tensors["b_in"] = tensors["b_dec"]
    given = {"input_mean": mean, "input_scale": None if scale is None else torch.tensor(scale)}
    given = {key: value.to(tensors["W_enc"]) for key, value in given.items() if value is not None}
    facts = CoderFacts(
        kind=kind,  # type: ignore[arg-type]
        d_in=tensors["W_enc"].shape[0],
        d_sae=tensors["W_enc"].shape[1],
        d_out=tensors["W_dec"].shape[1],
        activation=activation,  # type: ignore[arg-type]
        k=params.get("top_k"),
        normalize="standardize" if given else "none",
        model=model,
        hook=hook,
        tokens=tokens,
        layout=f"{NAME}, {'no schema' if schema is None else f'schema {schema}'}",
        more=plain(header),
    )
    return SparseCoder(facts, tensors | given)


def _parts(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    check_regular(file)
    with file.open("rb") as opened:
        line = opened.readline(LONGEST_LINE)
    header = parse_json(line, f"The first line of {file}")
    tensors = read_objects(file, start=len(line))
    if not isinstance(tensors, dict):
        raise LoadError(f"{file} is no file of saev's: expected a line with a JSON object, then tensors by name.")
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "activation.threshold") if name in tensors}
    return header, renamed(tensors, names, file)


def _activation(file: Path, header: dict[str, Any], config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the activation's class and its numbers: schema 1 has them in either of two places."""
    schema = header.get("schema")
    if schema not in (None, 1, 2, 3, 4, 5):
        raise LoadError(f"{file} has the schema {schema}; known are 1 to 5, and files without one.")
    written = config.get("activation")
    if isinstance(written, dict):
        name, params = written.get("cls"), written.get("params") or {}
    else:
        name, params = (header.get("cls", "Relu") if schema == 1 else "Relu"), config
    if name not in _ACTIVATIONS:
        raise LoadError(f"{file} has the activation {name!r}; expected one of {', '.join(_ACTIVATIONS)}.")
    return name, params
