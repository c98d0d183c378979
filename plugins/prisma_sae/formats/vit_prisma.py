"""ViT-Prisma's coders: ``weights.pt`` or ``n_images_<N>.pt``, with ``config.json``; of all ages.

The ``.pt`` pickles ``{"cfg": an object, "state_dict": ...}``; the object is read by its attributes, so that fields are
what they were when it was written, and no default of a newer version fills them in.

Source:
    ViT-Prisma: ``sae/sae.py`` (``save_model``, ``load_from_pretrained``), ``sae/config.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from prisma_core import LoadError
from prisma_core.plugin import SavedObject, read_json, read_objects
from prisma_sae.coder import CoderFacts, SparseCoder
from prisma_sae.formats.files import plain, reference_of
from prisma_sae.pickled import outline

NAME = "ViT-Prisma"
CONFIG = "config.json"
_LEGACY = "autoencoder"  # SAELens 2's name of the part with the tensors


def _known(name: str) -> bool:
    return name.startswith(("vit_prisma.", "sae_lens.")) and "Config" in name.rpartition(".")[2]


def recognises(path: Path) -> bool:
    if path.is_dir():
        return (path / CONFIG).is_file() and weights_in(path) is not None
    if path.name.endswith(".pkl.gz"):
        return True
    if path.suffix != ".pt":
        return False
    _, names = outline(path)
    return any(name.startswith("vit_prisma.") for name in names) or (not names and (path.parent / CONFIG).is_file())


def weights_in(folder: Path) -> Path | None:
    """Return a folder's file of weights: ``weights.pt``, else the ``n_images_<N>.pt`` of the most images."""
    if (folder / "weights.pt").is_file():
        return folder / "weights.pt"
    found = [
        (int(match[1]), each) for each in folder.iterdir() if (match := re.fullmatch(r"n_images_(\d+)\.pt", each.name))
    ]
    return max(found)[1] if found else None


def read(path: Path, *, hook: str | None = None) -> SparseCoder:
    """Read a folder, or a file of weights.

    Args:
        path: the folder, or the file; ``config.json`` beside a bare state dict.
        hook: the hook point, for files that do not say it.

    Raises:
        LoadError: a file is missing or damaged, wants to run code, or does not say where it belongs.
    """
    file = weights_in(path) if path.is_dir() else path
    if file is None:
        raise LoadError(f"{path} holds neither weights.pt nor n_images_<N>.pt.")
    config, tensors = _parts(file, read_objects(file, _known))
    return _coder(file, config, tensors, hook)


def _parts(file: Path, saved: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of a file of any age."""
    if not isinstance(saved, dict):
        raise LoadError(f"{file} holds a {type(saved).__name__}; expected a configuration and a state dict.")
    inner = saved.get(_LEGACY)
    if isinstance(inner, dict) and "state_dict" in inner:
        return _fields(saved.get("config")), dict(inner["state_dict"])
    if "state_dict" in saved:
        return _fields(saved.get("cfg")), dict(saved["state_dict"])
    if "W_enc" in saved:
        return read_json(file.parent / CONFIG), dict(saved)
    raise LoadError(f"{file} holds {', '.join(map(str, saved))}; expected cfg and state_dict.")


def _fields(config: Any) -> dict[str, Any]:
    return config.attributes if isinstance(config, SavedObject) else dict(config) if isinstance(config, dict) else {}


def _coder(file: Path, config: dict[str, Any], tensors: dict[str, Tensor], hook: str | None) -> SparseCoder:
    transcoder = "b_dec_out" in tensors
    gated = "r_mag" in tensors
    activation = config.get("activation_fn_str")
    if activation not in ("relu", "topk", "tanh-relu"):
        raise LoadError(
            f"{file} has the activation {activation!r}, expected relu, topk or tanh-relu. Defaults differ between "
            f"versions of ViT-Prisma, so a file that does not say it needs activation_fn_str in {CONFIG}."
        )
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    tensors["b_in"] = tensors["b_dec"]
    if transcoder:
        tensors["b_dec"] = tensors.pop("b_dec_out")
    if gated:
        tensors.pop("b_enc", None)  # in the file, and used nowhere
    normalize = config.get("normalize_activations")
    place = _place(config, "hook_point", "layer_subtype") or hook
    if place is None:
        raise LoadError(
            f"{file} says neither hook_point nor layer_subtype, and versions of ViT-Prisma differ in what they take "
            "then: name the place, as in read(path, hook='blocks.9.hook_mlp_out')."
        )
    facts = CoderFacts(
        kind="gated" if gated else "transcoder" if transcoder else "topk" if activation == "topk" else "standard",
        d_in=tensors["W_enc"].shape[0],
        d_sae=tensors["W_enc"].shape[1],
        d_out=tensors["W_dec"].shape[1],
        activation=activation,
        k=(config.get("activation_fn_kwargs") or {}).get("k"),
        normalize=normalize if normalize in ("layer_norm", "constant_norm_rescale") else "none",
        model=reference_of(config.get("model_name")),
        hook=place,
        hook_out=_place(config, "out_hook_point", "layer_out_subtype") if transcoder else None,
        tokens="cls" if config.get("cls_token_only") else "patches" if config.get("use_patches_only") else "all",
        layout=NAME,
        more=plain(config),
    )
    return SparseCoder(facts, tensors)


def _place(config: dict[str, Any], whole: str, part: str) -> str | None:
    """Return a hook point: as it stands in the file, else made of the layer and the part of the block."""
    if isinstance(config.get(whole), str) and "{" not in config[whole]:
        return config[whole]
    prefix = "out_" if whole.startswith("out") else ""
    layer = config.get(f"{prefix}hook_point_layer")
    layer = layer[0] if isinstance(layer, list | tuple) and len(layer) == 1 else layer
    if not isinstance(layer, int) or not config.get(part):
        return None
    return f"blocks.{layer}.{config[part]}"
