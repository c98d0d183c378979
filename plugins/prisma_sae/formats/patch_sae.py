"""PatchSAE's files (and those of the ViT code it builds on): ``{"cfg": ViTSAERunnerConfig, "state_dict": ...}``.

Layers are numbered as in transformers' ``hidden_states`` after the embedding: ``block_layer`` is an index into the
blocks, negative ones from the end, and what is read is the output of that block.

Source:
    patchsae: ``src/sae_training/{config,sparse_autoencoder}.py``.
"""

from __future__ import annotations

from pathlib import Path

from prisma_core import LoadError
from prisma_core.plugin import SavedObject, read_objects
from prisma_sae.coder import CoderFacts, SparseCoder
from prisma_sae.formats.files import plain, reference_of, renamed
from prisma_sae.pickled import outline

NAME = "PatchSAE"


def _known(name: str) -> bool:
    return name.rpartition(".")[2] in ("ViTSAERunnerConfig", "Config") and "sae_training" in name


def recognises(path: Path) -> bool:
    return path.is_file() and path.suffix in (".pt", ".pth") and any(map(_known, outline(path)[1]))


def read(path: Path, *, n_layers: int | None = None) -> SparseCoder:
    """Read a file.

    Args:
        path: the file.
        n_layers: how many blocks the model has, for a file that counts from the end.

    Raises:
        LoadError: the file is damaged, wants to run code, or is of a kind that its own code does not compute.
    """
    saved = read_objects(path, _known)
    if not isinstance(saved, dict) or "cfg" not in saved or "state_dict" not in saved:
        raise LoadError(f"{path} holds no cfg and state_dict.")
    config = saved["cfg"].attributes if isinstance(saved["cfg"], SavedObject) else saved["cfg"]
    if config.get("gated_sae"):
        raise LoadError(f"{path} is gated, which PatchSAE's code has no forward pass for.")
    layer = config.get("block_layer")
    if isinstance(layer, int) and layer < 0:
        if n_layers is None:
            raise LoadError(
                f"{path} counts its layer from the end ({layer}): say how many blocks the model has, n_layers=12."
            )
        layer += n_layers
    tensors = renamed(saved["state_dict"], {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}, path)
    tensors["b_in"] = tensors["b_dec"]
    facts = CoderFacts(
        kind="standard",
        d_in=tensors["W_enc"].shape[0],
        d_sae=tensors["W_enc"].shape[1],
        d_out=tensors["W_dec"].shape[1],
        model=reference_of(config.get("model_name")),
        hook=None if layer is None else f"blocks.{layer}.hook_resid_post",
        tokens="cls" if config.get("class_token") else "all",
        layout=NAME,
        more=plain(config),
    )
    return SparseCoder(facts, tensors)
