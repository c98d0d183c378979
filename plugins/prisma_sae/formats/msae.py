"""MSAE's files: ``{"model": tensors, "mean_center", "scaling_factor", "target_norm"}``; the rest is in the file's name.

The name is ``{features}_{width}_{activation}_...``, such as ``6144_768_TopKReLU_64_...pth``. Activations are
``(x - mean) * scaling_factor``, features are capped softly at 30.

Source:
    MSAE: ``sae.py``, ``utils.py`` (``process_data``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prisma_core import LoadError
from prisma_core.plugin import read_objects
from prisma_sae.coder import CoderFacts, SparseCoder
from prisma_sae.formats.files import renamed
from prisma_sae.pickled import outline

NAME = "MSAE"
_FILE = re.compile(r"(\d+)_(\d+)_([A-Za-z]+)(?:_(\d+))?")
_ACTIVATIONS = {"ReLU": "relu", "TopKReLU": "topk", "TopK": "topk-signed"}


def recognises(path: Path) -> bool:
    if not path.is_file() or path.suffix not in (".pt", ".pth"):
        return False
    saved, _ = outline(path)
    return isinstance(saved, dict) and isinstance(saved.get("model"), dict) and "latent_bias" in saved["model"]


def read(
    path: Path,
    *,
    activation: str | None = None,
    k: int | None = None,
    soft_cap: float | None = 30.0,
    hook: str | None = None,
) -> SparseCoder:
    """Read a file.

    Args:
        path: the file, named as MSAE names it.
        activation, k: what its name says, for a file that was renamed: ``ReLU``, ``TopKReLU`` or ``TopK``.
        soft_cap: what features are capped at; None for no cap. Files do not say it; 30 is the default of training.
        hook: the hook point: files do not say it. Published ones read what CLIP's tower returns.

    Raises:
        LoadError: the file is damaged, or its name does not say what it computes.
    """
    saved: dict[str, Any] = read_objects(path)
    model: dict[str, Tensor] = saved["model"]
    match = _FILE.match(path.name)
    named = activation or (match[3] if match else None)
    if named not in _ACTIVATIONS:
        raise LoadError(
            f"{path.name} names the activation {named!r}; expected {', '.join(_ACTIVATIONS)}. Nothing else says it: "
            "give activation= and k=."
        )
    k = k or (int(match[4]) if match and match[4] else None)
    names = {"encoder": "W_enc", "latent_bias": "b_enc", "pre_bias": "b_dec"}
    names["decoder" if "decoder" in model else "encoder.T"] = "W_dec"  # tied
    tensors = renamed(model, names, path, unread=["latents_activation_frequency"])
    tensors["b_in"] = tensors["b_dec"]
    factor, mean = saved.get("scaling_factor"), saved.get("mean_center")
    scaled = factor is not None and float(factor) not in (0.0, 1.0)
    centred = isinstance(mean, Tensor) and mean.ndim == 1 and bool(mean.any())
    if centred:
        tensors["input_mean"] = mean
    if scaled:
        tensors["input_scale"] = torch.tensor(1 / float(factor), dtype=tensors["W_enc"].dtype)
    facts = CoderFacts(
        kind="matryoshka" if "TopK" in named else "standard",
        d_in=tensors["W_enc"].shape[0],
        d_sae=tensors["W_enc"].shape[1],
        d_out=tensors["W_dec"].shape[1],
        activation=_ACTIVATIONS[named],  # type: ignore[arg-type]
        k=k,
        normalize="standardize" if scaled or centred else "none",
        soft_cap=soft_cap,
        hook=hook,
        layout=NAME,
        more={"file": path.name},
    )
    return SparseCoder(facts, tensors)
