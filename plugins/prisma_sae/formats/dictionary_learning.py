"""dictionary_learning's folders: ``ae.pt`` with ``config.json``.

Its ``from_pretrained`` rescales features so that decoder columns have unit norm, unless told not to; here they are as
in the file, as in training.

Source:
    dictionary_learning 0.1.0: ``dictionary.py``, ``trainers/{top_k,batch_top_k,matryoshka_batch_top_k}.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prisma_core import LoadError
from prisma_core.plugin import read_checkpoint, read_json
from prisma_sae.coder import CoderFacts, SparseCoder
from prisma_sae.formats.files import plain, reference_of, renamed

NAME = "dictionary_learning"
_LINEAR = {"encoder.weight.T": "W_enc", "encoder.bias": "b_enc", "decoder.weight.T": "W_dec"}
_OF_TRAINING = ("k", "threshold", "group_sizes")
_DIRECT = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("standard", {**_LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": ("standard", {**_LINEAR, "decoder.bias": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        {
            "encoder.weight.T": "W_enc",
            "decoder.weight.T": "W_dec",
            "decoder_bias": "b_dec",
            "r_mag": "r_mag",
            "gate_bias": "b_gate",
            "mag_bias": "b_mag",
        },
    ),
    "AutoEncoderTopK": ("topk", {**_LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}),
    "JumpReluAutoEncoder": ("jumprelu", _DIRECT),
    "MatryoshkaBatchTopKSAE": ("matryoshka", _DIRECT),
}


def recognises(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file() and _weights(path) is not None


def _weights(folder: Path) -> Path | None:
    return next((folder / name for name in ("ae.pt",) if (folder / name).is_file()), None)


def read(path: Path, *, use_threshold: bool = False, hook: str | None = None) -> SparseCoder:
    """Read a folder ``trainer_<i>``.

    Args:
        path: the folder.
        use_threshold: of a TopK coder, keep what is above its threshold, not the k largest.
        hook: the hook point: files name modules of a language model.

    Raises:
        LoadError: a file is missing or damaged, the class is not known, or a threshold was never set.
    """
    config, held = read_json(path / "config.json"), read_checkpoint(path / "ae.pt")
    trainer: dict[str, Any] = config.get("trainer") or {}
    name = trainer.get("dict_class")
    if name not in _CLASSES:
        raise LoadError(f"{path} holds a {name}; expected one of {', '.join(_CLASSES)}.")
    kind, names = _CLASSES[name]
    unread = _OF_TRAINING if kind in ("topk", "batchtopk", "matryoshka") else ()
    tensors = renamed(held, names, path, unread=unread)
    if name not in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        tensors["b_in"] = tensors["b_dec"]
    if use_threshold and kind == "topk":
        tensors["threshold"] = held["threshold"]
    if "threshold" in tensors and not tensors["threshold"].ndim and float(tensors["threshold"]) < 0:
        raise LoadError(f"{path}: the threshold was never set ({float(tensors['threshold'])}): training was too short.")
    groups = held["group_sizes"].cumsum(0).tolist() if "group_sizes" in held else ()
    facts = CoderFacts(
        kind=kind,  # type: ignore[arg-type]
        d_in=tensors["W_enc"].shape[0],
        d_sae=tensors["W_enc"].shape[1],
        d_out=tensors["W_dec"].shape[1],
        activation="jumprelu" if "threshold" in tensors else "topk" if kind == "topk" else "relu",
        k=_k(held, trainer),
        groups=tuple(groups),
        model=reference_of(trainer.get("lm_name")),
        hook=hook,
        layout=NAME,
        more=plain(config),
    )
    return SparseCoder(facts, tensors)


def _k(held: dict[str, Tensor], trainer: dict[str, Any]) -> int | None:
    k = held.get("k", trainer.get("k"))
    return int(k) if isinstance(k, int | torch.Tensor) else None
