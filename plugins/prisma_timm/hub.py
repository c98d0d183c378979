"""Trained weights by timm's own loader: from the cache where they lie there, else from where timm says they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors import SafetensorError
from torch import hub as torch_hub
from torch import nn

from prisma_core.plugin import LoadError, hub


def create_pretrained(reference: str, options: dict[str, Any]) -> nn.Module:
    """Return a timm model with its trained weights.

    Args:
        reference: ``NAME`` or ``NAME.TAG``, known to timm.
        options: passed to ``timm.create_model``.

    Raises:
        LoadError: it has no trained weights, nothing answers where they are, or what came cannot be read.
    """
    import timm

    cfg: Any = timm.get_pretrained_cfg(reference)
    if cfg is None or not cfg.has_weights:
        raise LoadError(
            f"timm has no trained weights for {reference}. Load it with pretrained=False for random ones, "
            f"or from a file as timm:{reference}@CHECKPOINT."
        )
    path = weights(reference, cfg)
    # Original JAX files are read by the model's own function, timm's files by timm's.
    source = {"file": str(path), "custom_load": path.suffix == ".npz"} if path else {}
    options = {**options, "pretrained_cfg_overlay": {**options.get("pretrained_cfg_overlay", {}), **source}}
    try:
        return timm.create_model(reference, pretrained=True, **options)
    except (OSError, RuntimeError, SafetensorError) as error:
        where = f"the file {path}" if path else cfg.url
        again = " It was not what the hub had sent and was removed: try again." if path and hub.forget(path) else ""
        raise LoadError(f"The weights of timm:{reference} could not be read from {where}: {error}{again}") from error


def weights(reference: str, cfg: Any) -> Path | None:
    """Return the file of a model's weights, downloaded if they are on the hub; None for timm to fetch them by address.

    Raises:
        LoadError: they cannot be reached, or came corrupted.
    """
    reference = f"timm:{reference}"
    instead = f"A local file needs no network: {reference}@FILE. Nor do random weights: pretrained=False."
    if cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        return hub.fetch(repository, names, revision=revision or None, reference=reference, instead=instead)
    parts = urlsplit(cfg.url)
    path = Path(torch_hub.get_dir()) / "checkpoints" / Path(parts.path).name
    if path.is_file():
        return path
    hub.reach(reference, address=f"{parts.scheme}://{parts.netloc}", instead=instead)
    return None
