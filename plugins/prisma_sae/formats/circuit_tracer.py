"""circuit-tracer's per-layer transcoders: ``layer_<i>.safetensors`` with ``config.yaml``; and one layer of its
cross-layer ones: ``W_enc_<i>.safetensors`` with ``W_dec_<i>.safetensors``, to the layer itself.

``W_enc`` is ``[feature, d_in]`` there, the transpose of SAELens'. Its TopK takes no relu, nor does its JumpReLU, whose
thresholds can be below zero.

Source:
    circuit-tracer: ``transcoder/{single_layer_transcoder,cross_layer_transcoder,activation_functions}.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from prisma_core import LoadError
from prisma_core.plugin import read_checkpoint, read_text
from prisma_sae.activations import Activation
from prisma_sae.coder import CoderFacts, SparseCoder
from prisma_sae.formats.files import reference_of, renamed

NAME = "circuit-tracer"
_LAYER = re.compile(r"(?:layer|W_enc)_(\d+)\.safetensors")


def recognises(path: Path) -> bool:
    return bool(_LAYER.fullmatch(path.name)) or (path.is_dir() and bool(_layers(path)))


def _layers(folder: Path) -> dict[int, Path]:
    return {int(match[1]): each for each in folder.iterdir() if (match := _LAYER.fullmatch(each.name))}


def read(
    path: Path, *, layer: int | None = None, to: int | None = None, hook: str | None = None, hook_out: str | None = None
) -> SparseCoder:
    """Read one layer's transcoder.

    Args:
        path: the file of a layer, or the folder with ``layer=``.
        layer: which, of a folder.
        to: of a cross-layer one, the layer that it writes to; default its own.
        hook, hook_out: within the block, such as ``hook_resid_mid``; default what ``config.yaml`` says.

    Raises:
        LoadError: a file is missing or damaged, or there are several layers and none was named.
    """
    file = path
    if path.is_dir():
        layers = _layers(path)
        if layer not in layers:
            raise LoadError(
                f"{path} holds the layers {sorted(layers)}: name one, as in read(path, layer={min(layers)})."
            )
        file = layers[layer]
    match = _LAYER.fullmatch(file.name)
    if match is None:
        raise LoadError(f"{file} is named after no layer: expected layer_<i>.safetensors or W_enc_<i>.safetensors.")
    own = int(match[1])
    config = _config(file.parent)
    crossing = file.name.startswith("W_enc_")
    tensors = _cross(file, own, own if to is None else to) if crossing else _single(file)
    target = own if to is None else to
    activation, k = _activation(config, tensors)
    reads, writes = hook or config.get("feature_input_hook"), hook_out or config.get("feature_output_hook")
    facts = CoderFacts(
        kind="transcoder",
        d_in=tensors["W_enc"].shape[0],
        d_sae=tensors["W_enc"].shape[1],
        d_out=tensors["W_dec"].shape[1],
        activation=activation,
        k=k,
        model=reference_of(config.get("model_name")),
        hook=reads and f"blocks.{own}.{_POINTS.get(reads, reads)}",
        hook_out=writes and f"blocks.{target}.{writes}",
        layout=NAME,
        more=config,
    )
    return SparseCoder(facts, tensors)


def _activation(config: dict[str, str], tensors: dict[str, Tensor]) -> tuple[Activation, int | None]:
    """Return the activation and its k: what ``config.yaml`` names, else what the tensors are of."""
    k, named = config.get("k", tensors.pop("k", None)), config.get("activation")
    if named in ("topk", "relu"):
        tensors.pop("threshold", None)
    if "threshold" in tensors:
        return ("jumprelu" if bool((tensors["threshold"] >= 0).all()) else "jump-signed"), None
    return ("relu", None) if k is None or named == "relu" else ("topk-signed", int(k))


# What TransformerLens calls the input of an MLP is the output of the norm before it with us.
_POINTS = {"mlp.hook_in": "ln2.hook_normalized"}


def _single(file: Path) -> dict[str, Tensor]:
    held = read_checkpoint(file)
    names = {"W_enc.T": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    optional = {"activation_function.threshold": "threshold", "W_skip": "W_skip", "k": "k"}
    return renamed(held, names | {old: new for old, new in optional.items() if old in held}, file)


def _cross(file: Path, own: int, to: int) -> dict[str, Tensor]:
    held = read_checkpoint(file)
    other = file.with_name(f"W_dec_{own}.safetensors")
    written = renamed(read_checkpoint(other), {f"W_dec_{own}": "W_dec"}, other)["W_dec"]
    if not own <= to < own + written.shape[1]:
        raise LoadError(f"{file} writes to the layers {own} to {own + written.shape[1] - 1}, not to {to}.")
    names = {f"W_enc_{own}.T": "W_enc", f"b_enc_{own}": "b_enc"}
    if f"threshold_{own}" in held:
        names[f"threshold_{own}"] = "threshold"
    tensors = renamed(held, names, file, unread=[f"b_dec_{own}"]) | {"W_dec": written[:, to - own].contiguous()}
    other = file.with_name(f"W_enc_{to}.safetensors")  # one bias a layer: that of the layer written to
    biases = held if to == own else read_checkpoint(other)
    return tensors | renamed(biases, {f"b_dec_{to}": "b_dec"}, other, unread=biases)


def _config(folder: Path) -> dict[str, str]:
    """Return the flat part of ``config.yaml``: lines ``key: value``."""
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    lines = re.findall(r"^(\w+):[ \t]*([^\n#]*?)[ \t]*$", read_text(file), flags=re.MULTILINE)
    return {key: value.strip("\"'") for key, value in lines if value}
