"""sparsify's folders (EleutherAI): ``cfg.json`` with ``sae.safetensors``; TopK or groupmax.

Source:
    eai-sparsify 1.3.3: ``sparse_coder.py``, ``fused_encoder.py``.
"""

from __future__ import annotations

from pathlib import Path

from prisma_core import LoadError
from prisma_core.plugin import read_checkpoint, read_json
from prisma_sae.coder import CoderFacts, SparseCoder
from prisma_sae.formats.files import plain, renamed

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def recognises(path: Path) -> bool:
    return path.is_dir() and (path / WEIGHTS).is_file()


def read(path: Path, *, hook: str | None = None, hook_out: str | None = None) -> SparseCoder:
    """Read a folder.

    Args:
        path: the folder of one module.
        hook, hook_out: the hook points: files name modules of the upstream model.

    Raises:
        LoadError: a file is missing or damaged.
    """
    config, held = read_json(path / CONFIG), read_checkpoint(path / WEIGHTS)
    names = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    if config.get("skip_connection"):
        names["W_skip"] = "W_skip"
    tensors = renamed(held, {old: new for new, old in names.items()}, path)
    transcode = bool(config.get("transcode"))
    if not transcode:
        tensors["b_in"] = tensors["b_dec"]
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax") or "k" not in config:
        raise LoadError(
            f"{path} has the activation {activation!r} with k={config.get('k')}; expected topk or groupmax."
        )
    facts = CoderFacts(
        kind="transcoder" if transcode else "topk",
        d_in=tensors["W_enc"].shape[0],
        d_sae=tensors["W_enc"].shape[1],
        d_out=tensors["W_dec"].shape[1],
        activation=activation,
        k=config["k"],
        hook=hook,
        hook_out=hook_out,
        layout=NAME,
        more=plain(config),
    )
    return SparseCoder(facts, tensors)
