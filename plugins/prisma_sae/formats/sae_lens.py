"""SAELens' folders, of version 6 and before: ``cfg.json`` with ``sae_weights.safetensors``; and Prisma's own.

Prisma writes the same folder with ``prisma.json`` beside it, which holds the facts that SAELens has no place for. A
coder that SAELens cannot compute (features below zero, another normalisation) is written without ``cfg.json``.

Source:
    SAELens 6.54: ``saes/*.py``, ``loading/pretrained_sae_loaders.py`` (``handle_pre_6_0_config``).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prisma_core import LoadError
from prisma_core.plugin import (
    check_facts,
    checked,
    digest,
    facts_digest,
    place,
    read_checkpoint,
    read_fields,
    read_json,
    replacing_both,
    settled,
    shown,
    write_text,
)
from prisma_sae.coder import CoderFacts, SparseCoder
from prisma_sae.formats.files import plain, reference_of

NAME = "SAELens"
CONFIG, WEIGHTS, OURS, SCALER = "cfg.json", "sae_weights.safetensors", "prisma.json", "activation_scaler.json"
_SEALED, _BESIDE, SCHEMA = ("facts", "same"), ("schema", "sha256", "facts_sha256"), 1
_NORMALIZE = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in")
_KINDS = {
    "standard": "standard",
    "topk": "topk",
    "abstopk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "transcoder",
    "jumprelu_transcoder": "transcoder",
    "skip_transcoder": "transcoder",
    "jumprelu_skip_transcoder": "transcoder",
    # Of checkpoints: finished ones are saved as jumprelu.
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "matryoshka",
}

_OTHERS = {  # which are no function of one row by an encoder, an activation and a decoder
    "temporal": ", whose features depend on the tokens before",
    "matching_pursuit": ", whose encoder is a loop over residuals",
}


def recognises(path: Path) -> bool:
    return path.is_dir() and any(os.path.lexists(path / name) for name in (WEIGHTS, OURS))


def read(path: Path) -> SparseCoder:
    """Read a folder of SAELens' or Prisma's.

    Raises:
        LoadError: a file is missing or damaged, or says what has no meaning here.
    """
    if os.path.lexists(path / OURS):  # whatever it is: without it the facts would be SAELens' alone
        return settled(path / OURS, lambda: _own(path))
    return _from_sae_lens(path, read_json(path / CONFIG), read_checkpoint(path / WEIGHTS))


def _own(path: Path) -> SparseCoder:
    ours = read_json(path / OURS)
    schema, unknown = ours.get("schema"), sorted(set(ours) - {*_SEALED, *_BESIDE})
    if schema != SCHEMA or unknown:
        what = f"schema {shown(schema)}" if schema != SCHEMA else f"a field {unknown[0]!r}"
        raise LoadError(f"{path / OURS} has {what}, which this Prisma does not know: update Prisma.")
    check_facts({name: ours.get(name) for name in _SEALED}, ours.get("facts_sha256"), path / OURS, "facts_sha256")
    weights = place(path, WEIGHTS, ours.get("sha256"))
    tensors = read_checkpoint(weights)
    if ours.get("sha256") not in (None, digest(tensors)):
        raise LoadError(
            f"{weights} holds other weights than {OURS} was written with. If another library wrote them since, remove "
            f"{OURS}; else save the coder again."
        )
    try:
        tensors |= {name: tensors[other] for name, other in ours["same"].items()}
        wrong = f"{path / OURS} does not describe a sparse coder"
        return SparseCoder(read_fields(CoderFacts, ours["facts"], wrong), tensors)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise LoadError(f"{path / OURS} does not describe a sparse coder: {error}") from error


def _from_sae_lens(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseCoder:
    about = {**config, **(config.get("metadata") or {})}
    k = about.get("k") or (about.get("activation_fn_kwargs") or {}).get("k")
    activation = about.get("activation_fn") or about.get("activation_fn_str") or "relu"
    architecture = about.get("architecture", "standard")
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    if architecture not in _KINDS:
        reason = _OTHERS.get(architecture, "")
        raise LoadError(
            f"{path} holds the architecture {architecture!r}{reason}; expected one of {', '.join(_KINDS)}. SAELens "
            "itself loads it."
        )
    if architecture == "standard" and activation not in ("relu", "tanh-relu"):
        raise LoadError(f"{path} has the activation {activation!r}; expected relu, tanh-relu or topk.")
    if about.get("finetuning_scaling_factor") and "finetuning_scaling_factor" in tensors:
        raise LoadError(f"{path} has scaling factors from fine-tuning: fold them into W_dec with SAELens first.")
    normalize, tensors = _normalization(path, about, tensors)
    transcoder = "transcoder" in architecture
    if "topk" in architecture and about.get("rescale_acts_by_decoder_norm"):
        tensors = _with_unit_decoder(tensors)
    if "topk_threshold" in tensors:  # a number in double precision, as training moves it
        tensors["threshold"] = tensors.pop("topk_threshold").to(tensors["W_enc"]).expand(len(tensors["b_enc"]))
    # Before version 6 the bias was always taken off unless said otherwise; a transcoder's has another width.
    if not transcoder and about.get("apply_b_dec_to_input", True):
        tensors["b_in"] = tensors["b_dec"]
    hook = about.get("hook_name") or about.get("hook_point")
    facts = CoderFacts(
        kind=_KINDS[architecture],  # type: ignore[arg-type]
        d_in=tensors["W_enc"].shape[0],
        d_sae=tensors["W_enc"].shape[1],
        d_out=tensors["W_dec"].shape[1],
        activation=_activation(architecture, activation),
        k=k if k is None or k == int(k) else None,  # of BatchTopK a mean over rows
        groups=tuple(about.get("matryoshka_widths") or ()),
        normalize=normalize,
        restores=not transcoder,  # SAELens' transcoders leave their output normalised
        model=reference_of(about.get("model_name")),
        hook=hook,
        hook_out=about.get("hook_name_out"),
        layout=NAME,
        more=plain(config),
    )
    return SparseCoder(facts, tensors)


def _activation(architecture: str, activation: str) -> Any:
    if "jumprelu" in architecture or "batchtopk" in architecture:
        return "jumprelu"
    if architecture == "abstopk":
        return "topk-abs"
    return "topk" if architecture == "topk" else activation if architecture == "standard" else "relu"


def _normalization(path: Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    how = about.get("normalize_activations")
    how = {None: "none", False: "none", True: "expected_average_only_in"}.get(how, how)
    if how not in _NORMALIZE:
        raise LoadError(f"{path} normalises by {how!r}; expected one of {', '.join(_NORMALIZE)}.")
    if how != "expected_average_only_in":
        return how, tensors
    # A finished coder has the factor in its weights; a checkpoint has it beside them.
    factor = read_json(path / SCALER).get("scaling_factor") if (path / SCALER).is_file() else None
    if factor is None:
        return "none", tensors
    return "standardize", tensors | {"input_scale": torch.tensor(1 / factor, dtype=tensors["W_enc"].dtype)}


def _with_unit_decoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the norms of decoder rows into the encoder, so that TopK compares what it compared in training."""
    norm = tensors["W_dec"].norm(dim=-1)
    changed = {"W_enc": tensors["W_enc"] * norm, "b_enc": tensors["b_enc"] * norm}
    return tensors | changed | {"W_dec": tensors["W_dec"] / norm[:, None]}


@checked
def save(coder: SparseCoder, folder: str | Path) -> Path:
    """Write a coder into a folder that ``read`` reads, and SAELens too where it can compute it.

    After a kill it is the old coder or the new one; without ``cfg.json`` to SAELens, which has no digests.

    >>> import tempfile
    >>> from prisma_sae import load
    >>> save(load("scenes-3l"), tempfile.mkdtemp() + "/coder").name
    'coder'

    Raises:
        LoadError: the disk is full, read-only, or refuses in another way.
    """
    folder = Path(folder)
    tensors = {name: tensor.contiguous().clone() for name, tensor in coder.tensors().items()}
    config = sae_lens_config(coder)
    # SAELens refuses tensors that it does not know: there the bias of the input is that of the output.
    same = {"b_in": "b_dec"} if config is not None and tensors.pop("b_in", None) is not None else {}
    if config is not None and "threshold" in tensors:  # there each feature has its own
        tensors["threshold"] = tensors["threshold"].expand(coder.facts.d_sae).contiguous()
    sha256 = digest(tensors)
    facts = {"facts": coder.facts.model_dump(mode="json"), "same": same}
    facts = {"schema": SCHEMA, "sha256": sha256, "facts_sha256": facts_digest(facts), **facts}
    with replacing_both(folder / WEIGHTS, folder / OURS, sha256, folder / CONFIG) as (weights, head):
        save_file(tensors, weights)
        head.write_text(_text(facts), encoding="utf-8")
    if config is not None:
        write_text(folder / CONFIG, _text(config))
    return folder


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def sae_lens_config(coder: SparseCoder) -> dict[str, Any] | None:
    """Return SAELens' ``cfg.json`` for a coder, or None where SAELens would compute something else."""
    facts, tensors = coder.facts, coder.tensors()
    same = coder.b_in is None or (coder.b_dec is not None and torch.equal(coder.b_in, coder.b_dec))
    transcoder = coder.is_transcoder or facts.kind == "transcoder"
    architecture = {
        ("relu", False, False): "standard",
        ("relu", True, False): "gated",
        ("topk", False, False): "topk",
        ("topk-abs", False, False): "abstopk",
        ("jumprelu", False, False): "jumprelu",
        ("relu", False, True): "skip_transcoder" if "W_skip" in tensors else "transcoder",
        ("jumprelu", False, True): "jumprelu_skip_transcoder" if "W_skip" in tensors else "jumprelu_transcoder",
    }.get((facts.activation, "r_mag" in tensors, transcoder))
    unlike = (
        not same
        or facts.normalize == "standardize"
        or facts.soft_cap is not None
        or "b_dec" not in tensors
        or ("W_skip" in tensors and not transcoder)
        or (transcoder and (coder.b_in is not None or (facts.restores and facts.normalize != "none")))
    )
    if architecture is None or unlike:
        return None
    metadata = {"model_name": facts.model, "hook_name": facts.hook, "sae_lens_version": "6.0.0"}
    config: dict[str, Any] = {
        "d_in": facts.d_in,
        "d_sae": facts.d_sae,
        "dtype": str(coder.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": coder.b_in is not None,
        "normalize_activations": facts.normalize,
        "reshape_activations": "none",
        "architecture": architecture,
        "metadata": metadata | ({"hook_name_out": facts.hook_out} if transcoder else {}),
    }
    if facts.activation in ("topk", "topk-abs"):
        config |= {"k": facts.k, "rescale_acts_by_decoder_norm": False}
    return config | ({"d_out": facts.d_out} if transcoder else {})
