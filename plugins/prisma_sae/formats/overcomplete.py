"""overcomplete's models, pickled whole: read without overcomplete and without running anything.

Readable are encoders that are one linear layer, with batch norm or none; other encoders are refused. A dictionary that
was fused for evaluation is taken as it is; of an archetypal one it spares the points it was made of. One that was saved
in training is brought to norm as ``eval()`` does it: a training ends behind a step, which leaves rows of other lengths.
UniversalSAE's checkpoints are the state dict of such a TopK model, and say neither ``k`` nor the normalization.

Source:
    overcomplete 0.3.0: ``sae/{modules,dictionary,archetypal_dictionary,topk_sae,batchtopk_sae,jump_sae}.py``;
    UniversalSAE: ``{"epoch", "model_state_dict", "optimizer_state_dict", "learning_rate"}``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prisma_core import LoadError
from prisma_core.plugin import SavedObject, read_objects
from prisma_sae.coder import CoderFacts, SparseCoder, Tokens
from prisma_sae.formats.files import renamed
from prisma_sae.pickled import outline, tensors_in

NAME = "overcomplete"
STATE, _LAYER = "model_state_dict", "encoder.final_block.0"
_NORMS = {"l2": 2, "max_l2": 2, "l1": 1, "max_l1": 1}
_TENSORS = re.compile(
    r"encoder\.final_block\.[01]\.(weight|bias|running_mean|running_var|num_batches_tracked)|thresholds|"
    r"dictionary\.(_weights|W|C|Relax|multiplier)"
)


def _known(name: str) -> bool:
    return name.startswith(("overcomplete.", "torch.nn.")) or name == "functools.partial"


def recognises(path: Path) -> bool:
    if not path.is_file() or path.suffix not in (".pt", ".pth"):
        return False
    saved, names = outline(path)
    held = saved.get(STATE) if isinstance(saved, dict) else None
    bare = isinstance(held, dict) and any(str(name).endswith("dictionary._weights") for name in held)
    return bare or any(name.startswith("overcomplete.") for name in names)


def read(
    path: Path,
    *,
    hook: str | None = None,
    tokens: Tokens | None = None,
    model: str | None = None,
    k: int | None = None,
    normalization: str | None = None,
) -> SparseCoder:
    """Read a pickled model, or a checkpoint of UniversalSAE.

    Args:
        path: the file.
        hook, tokens, model: where it belongs: files do not say it.
        k: of a checkpoint, which does not say how many features are on.
        normalization: of a checkpoint whose rows are not of length 1: ``l1``, ``l2``, ``max_l1``, ``max_l2`` or
            ``identity``, as in the dictionary's settings.

    Raises:
        LoadError: the file is damaged, wants to run other code, or is of a kind that is no single linear encoder.
    """
    module = read_objects(path, _known)
    if isinstance(module, dict) and isinstance(module.get(STATE), dict):
        return _checkpoint(module[STATE], path, k, normalization, hook=hook, tokens=tokens, model=model)
    if k is not None or normalization is not None:
        what = f"k={k}" if k is not None else f"normalization={normalization!r}"
        raise LoadError(f"{path} is a whole model, which says it: leave out {what}.")
    if isinstance(module, SavedObject) and isinstance(module.get("module"), SavedObject):  # DataParallel
        module = module.get("module")
    if not isinstance(module, SavedObject):
        raise LoadError(f"{path} holds a {type(module).__name__}; expected a model of overcomplete's.")
    return _coder(module, str(path), hook=hook, tokens=tokens, model=model)


def _checkpoint(
    held: dict[str, Tensor], path: Path, k: int | None, normalization: str | None, **place: Any
) -> SparseCoder:
    if k is None:
        raise LoadError(f"{path} is a state dict, which does not say how many features are on: read(path, k=...).")
    held = {name.removeprefix("module."): tensor for name, tensor in held.items()}  # DataParallel
    names = {f"{_LAYER}.weight.T": "W_enc", f"{_LAYER}.bias": "b_enc", "dictionary._weights": "W_dec"}
    tensors = renamed(held, names, path, unread=["dictionary.multiplier"])
    lengths = tensors["W_dec"].norm(dim=-1)
    if normalization is None and not torch.allclose(lengths, torch.ones_like(lengths), atol=0.1):  # 0.1: a step's move
        raise LoadError(
            f"{path} has rows of length {lengths.min():.3g} to {lengths.max():.3g}, and a state dict does not say how "
            f"they are brought to norm: read(path, normalization=...), one of {', '.join((*_NORMS, 'identity'))}."
        )
    tensors["W_dec"] = _to_norm(tensors["W_dec"], normalization or "l2", str(path))
    if "dictionary.multiplier" in held:
        tensors["W_dec"] = held["dictionary.multiplier"].detach().exp() * tensors["W_dec"]
    d_in, d_sae = tensors["W_enc"].shape
    d_out = tensors["W_dec"].shape[1]
    facts = CoderFacts(kind="topk", d_in=d_in, d_sae=d_sae, d_out=d_out, activation="topk", k=k, layout=NAME, **place)
    return SparseCoder(facts, tensors | {"b_dec": torch.zeros_like(tensors["W_dec"][0])})


def _coder(module: SavedObject, where: str, **place: Any) -> SparseCoder:
    dictionary = _dictionary(module.get("dictionary"), where)
    W_enc, b_enc = _encoder(module.get("encoder"), f"{where}, a {module.name},")
    kind, activation, k, extra = _activation(module, W_enc.shape[1], where)
    if unknown := [name for name in tensors_in(module) if not _TENSORS.fullmatch(name)]:
        raise LoadError(f"{where} holds {unknown[0]}, whose use this reader does not know: it would be left out.")
    if "Archetypal" in module.get("dictionary").name:
        kind = "archetypal"
    facts = CoderFacts(
        kind=kind,
        d_in=W_enc.shape[0],
        d_sae=W_enc.shape[1],
        d_out=dictionary.shape[1],
        activation=activation,
        k=k,
        layout=NAME,
        more={"class": module.name},
        **place,
    )
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": dictionary, "b_dec": torch.zeros_like(dictionary[0])}
    return SparseCoder(facts, {key: value.detach().contiguous() for key, value in (tensors | extra).items()})


def _activation(module: SavedObject, d_sae: int, where: str) -> tuple[Any, Any, int | None, dict[str, Tensor]]:
    name = module.name
    if name.endswith("BatchTopKSAE"):
        threshold = module.get("running_threshold")
        if threshold is None:
            raise LoadError(f"{where} has no running threshold: it was never trained, or saved as a state dict.")
        threshold = torch.as_tensor(threshold).float()
        # It keeps z >= threshold; the number below makes that z > threshold, to the bit.
        below = torch.nextafter(threshold, torch.tensor(-torch.inf))
        return "batchtopk", "jumprelu", module.get("top_k"), {"threshold": below.expand(d_sae).clone()}
    if name.endswith("TopKSAE"):
        return "topk", "topk", int(module.get("top_k")), {}
    if name.endswith("JumpSAE"):
        return "jumprelu", "jumprelu", None, {"threshold": module.get("thresholds").detach().exp()}
    if name in ("SAE", "RASAE", "MatryoshkaSAE"):
        return "standard", "relu", None, {}
    raise LoadError(f"{where} is a {name}, whose encoder is no linear layer with a threshold: not readable as a coder.")


def _dictionary(part: Any, where: str) -> Tensor:
    """Return the dictionary as evaluation uses it: fused, or made of its parts as overcomplete makes it."""
    if not isinstance(part, SavedObject):
        raise LoadError(f"{where} has no dictionary.")
    fused = part.get("_fused_dictionary")
    if isinstance(fused, Tensor) and not part.get("training"):  # one of an earlier evaluation counts no more
        return fused.detach()
    tensors = tensors_in(part)
    scale = tensors["multiplier"].exp()
    if "_weights" in tensors:
        normalization = getattr(part.get("normalization"), "__qualname__", "nothing")
        return scale * _to_norm(tensors["_weights"], normalization.rpartition(".normalize_")[2], where)
    rows = torch.relu(tensors["W"])
    rows = rows / (rows.sum(-1, keepdim=True) + 1e-8)
    delta = float(part.get("delta"))
    relax = tensors["Relax"] * torch.clamp(delta / tensors["Relax"].norm(dim=-1, keepdim=True), max=1)
    return (rows @ tensors["C"] + relax) * scale


def _to_norm(rows: Tensor, how: str, where: str) -> Tensor:
    """Return a dictionary's rows as its training mode leaves them."""
    if how == "identity":
        return rows
    if how not in _NORMS:
        raise LoadError(f"{where} normalizes its dictionary by {how!r}; readable are {', '.join(_NORMS)}, identity.")
    lengths = rows.norm(p=_NORMS[how], dim=1, keepdim=True)
    return rows / (lengths.amax(dim=0, keepdim=True) if how.startswith("max_") else lengths + 1e-8)


def _encoder(part: Any, where: str) -> tuple[Tensor, Tensor]:
    """Return a linear encoder's weight ``[d_in d_sae]`` and bias, batch norm of evaluation folded in."""
    name = _name(part)
    if (
        not isinstance(part, SavedObject)
        or name != "MLPEncoder"
        or (part.get("mlp_blocks") and part.get("mlp_blocks").get("0"))
    ):
        raise LoadError(f"{where} has the encoder {name} with hidden layers; readable is one linear layer.")
    tensors = tensors_in(part)
    weight, bias = tensors["final_block.0.weight"].T, tensors["final_block.0.bias"]
    norm = part.get("final_block.1")
    kind = _name(norm)
    if kind == "BatchNorm1d":
        spread = (tensors["final_block.1.running_var"] + norm.get("eps")).sqrt()
        factor = tensors["final_block.1.weight"] / spread
        return weight * factor, (bias - tensors["final_block.1.running_mean"]) * factor + tensors["final_block.1.bias"]
    if kind != "Identity":
        raise LoadError(f"{where} has {kind} behind its linear layer; readable are batch norm and none.")
    if (act := _name(part.get("final_activation"))) != "ReLU":
        raise LoadError(f"{where} has the activation {act} in its encoder; readable is ReLU.")
    return weight, bias


def _name(part: Any) -> str:
    return part.name if isinstance(part, SavedObject) else type(part).__name__
