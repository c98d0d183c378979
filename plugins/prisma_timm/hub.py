"""Trained weights by timm's own loader: from the cache where they lie there, else after one knock on the hub's door.

timm and its hub library try an unreachable host a dozen times over a minute; one short probe spares that. Nothing that
other code in this process relies on (environment, timeouts, offline mode) is changed.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from safetensors import SafetensorError
from torch import hub as torch_hub
from torch import nn

from prisma_core.errors import LoadError

SECONDS = 5.0


def create_pretrained(reference: str, options: dict[str, Any]) -> nn.Module:
    """Return a timm model with its trained weights.

    Args:
        reference: ``NAME`` or ``NAME.TAG``, known to timm.
        options: passed to ``timm.create_model``.

    Raises:
        LoadError: it has no trained weights, nothing answers where they are, or what came cannot be read.
    """
    import timm
    from huggingface_hub import errors

    cfg: Any = timm.get_pretrained_cfg(reference)
    if cfg is None or not cfg.has_weights:
        raise LoadError(
            f"timm has no trained weights for {reference}. Load it with pretrained=False for random ones, "
            f"or from a file as timm:{reference}@CHECKPOINT."
        )
    kept = cached(cfg)
    if kept is None:
        probe(reference, cfg)
    else:
        # Original JAX files are read by the model's own function, timm's files by timm's.
        source = {"file": str(kept), "custom_load": kept.suffix == ".npz"}
        options = {**options, "pretrained_cfg_overlay": {**options.get("pretrained_cfg_overlay", {}), **source}}
    # What a connection may fail with half-way depends on the hub library's version; its own base class covers it.
    broken = (OSError, RuntimeError, SafetensorError, getattr(errors, "HTTPError", OSError))
    try:
        return timm.create_model(reference, pretrained=True, **options)
    except broken as error:
        where = f"the file {kept}" if kept else _address(cfg)
        raise LoadError(f"The weights of timm:{reference} could not be read from {where}: {error}") from error


def cached(cfg: Any) -> Path | None:
    """Return the file of a model's weights in the cache of the hub or of torch, or None."""
    from huggingface_hub import try_to_load_from_cache

    if cfg.hf_hub_id:
        repository, _, revision = cfg.hf_hub_id.partition("@")
        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        for name in names:
            found = try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
        return None
    path = Path(torch_hub.get_dir()) / "checkpoints" / Path(urlsplit(cfg.url).path).name
    return path if path.is_file() else None


def probe(reference: str, cfg: Any) -> None:
    """Knock once where the weights are.

    Raises:
        LoadError: offline mode is on, or nothing answers within seconds.
    """
    from huggingface_hub import constants

    instead = f"They are not in the cache. A local file needs no network: timm:{reference}@CHECKPOINT."
    if cfg.hf_hub_id and constants.HF_HUB_OFFLINE:
        raise LoadError(f"The weights of timm:{reference} are on the hub, and HF_HUB_OFFLINE is set. {instead}")
    address = _address(cfg)
    if problem := _knock(address):
        raise LoadError(f"The weights of timm:{reference} are at {address}: no answer there ({problem}). {instead}")


def _address(cfg: Any) -> str:
    from huggingface_hub import constants

    if cfg.hf_hub_id:
        return constants.ENDPOINT
    parts = urlsplit(cfg.url)
    return f"{parts.scheme}://{parts.netloc}"


def _knock(address: str) -> str | None:
    """Return why nothing answers at an address, or None if something does."""
    answer: list[str | None] = []
    # Looking up a name has no timeout of its own, so a thread waits for it.
    thread = threading.Thread(target=lambda: answer.append(_ask(address)), daemon=True)
    thread.start()
    thread.join(SECONDS + 1)
    return answer[0] if answer else f"no answer in {SECONDS:.0f} seconds"


def _ask(address: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return None  # an answer
    except urllib.error.URLError as error:
        # Other reasons, such as a certificate only the hub library knows, are left for it to judge.
        return str(error.reason) if isinstance(error.reason, ConnectionError | TimeoutError | socket.gaierror) else None
    except (ConnectionError, TimeoutError) as error:
        return str(error) or type(error).__name__
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return None
