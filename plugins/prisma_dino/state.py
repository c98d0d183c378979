"""From Meta's state dicts to models: architecture facts are read off the tensors' shapes, never off a file's name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from prisma_core.plugin import Eps, Heads, InputError, LoadError, Whole, check_axes, check_shapes, depth_in, read_states
from prisma_core.plugin import Options as SourceOptions
from prisma_dino.meta import Architecture, MetaViT

HEADS = re.compile(r"(?:dino_|ibot_)?head\..+")
WRAPPED = re.compile(r"^(?:module\.|_orig_mod\.)+")
CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
AXES = {
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
    "register_tokens": 3,
    "storage_tokens": 3,
    "rope_embed.periods": 1,
    "blocks.0.mlp.fc1.weight": 2,
    "blocks.0.mlp.w12.weight": 2,
    "blocks.0.mlp.w1.weight": 2,
}
NEEDED = ("cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.attn.qkv.weight", "norm.weight")
D_HEAD = 64  # of every model Meta published; the first two generations' files do not say


INSTEAD = (
    "Expected one of Meta's files, or all of a backbone's tensors under their names there; a model that was changed is "
    "built with the code that made it, and hooked with prisma.adapt(model)."
)


class Options(SourceOptions):
    """Facts that files lack, or hold more than once.

    Attributes:
        heads, eps: instead of the rule (see ``architecture``).
        image_size: the native side of images, or height and width, of models with rotary positions; the others' is in
            the file.
        key: which of a checkpoint's networks; None prefers the teacher.
    """

    heads: Heads = None
    eps: Eps = None
    image_size: Annotated[
        Whole | tuple[Whole, Whole] | None,
        Field(description="a whole number of pixels a side, such as 512, or (height, width)"),
    ] = None
    key: Annotated[str | None, Field(description="the name of a network in the file, such as 'student'")] = None


def read(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of one of Meta's files by their plain names: backbone and heads, wrappers taken off.

    Args:
        path: a backbone's file, or a whole training checkpoint.
        key: which of a checkpoint's networks; None prefers the teacher.

    Raises:
        LoadError: the file cannot be read safely.
        InputError: it has no such network.
    """
    states = read_states(path)
    network = "teacher" if key is None else key
    state = states.get(network, next(iter(states.values())) if len(states) == 1 else {})
    tensors = {WRAPPED.sub("", name): tensor for name, tensor in state.items()}
    inside = {name.removeprefix(f"{network}."): x for name, x in tensors.items() if name.startswith(f"{network}.")}
    if not (inside or network in states) and (key is not None or not state):
        networks = ", ".join(name for name in states if name)
        advice = f"it holds {networks}. Give key= one of them" if networks else "it holds one alone. Leave key= out"
        raise InputError(f"{path} holds no network named {network!r}: {advice}.")
    tensors = {WRAPPED.sub("", name): tensor for name, tensor in (inside or tensors).items()}
    return {CHUNKED.sub(r"blocks.\1.", name.removeprefix("backbone.")): tensor for name, tensor in tensors.items()}


def architecture(tensors: Mapping[str, Tensor], where: object, given: Options) -> Architecture:
    """Return what a backbone's tensors say of it.

    What shapes do not say follows a rule. Heads: from the number of rotary periods, else heads of 64 channels. Eps:
    1e-5 with rotary positions, else 1e-6. Positions of other sizes: scaled by (side + 0.1) without registers,
    antialiased with them.

    Args:
        where: the file, for messages.
        given: options instead of the rules.

    Raises:
        LoadError: these are no tensors of such a backbone.
        InputError: an option that the file contradicts, or one that it needs.
    """
    lacking = [name for name in NEEDED if name not in tensors]
    if lacking:
        there = ", ".join(list(tensors)[:4])
        raise LoadError(
            f"{where} is no vision transformer of DINO's: it lacks {', '.join(lacking)}; it holds {there}, ... "
            f"{INSTEAD}"
        )
    check_axes(tensors, AXES, where, INSTEAD)
    width, in_channels, *patch = tensors["patch_embed.proj.weight"].shape
    rotary = "rope_embed.periods" in tensors
    registers_name = "storage_tokens" if rotary else "register_tokens"
    registers = tensors[registers_name].shape[1] if registers_name in tensors else 0
    second = rotary or registers > 0 or "mask_token" in tensors or "blocks.0.ls1.gamma" in tensors
    mlp = next((kind for kind, name in _MLPS.items() if f"blocks.0.mlp.{name}.weight" in tensors), None)
    if mlp is None:
        raise LoadError(f"{where} is no vision transformer of DINO's: its MLP is of another kind. {INSTEAD}")
    periods = len(tensors["rope_embed.periods"]) if rotary else 0
    return Architecture(
        width=width,
        depth=depth_in(tensors, "blocks.", where),
        heads=_heads(width, periods, given.heads, where),
        patch=(patch[0], patch[1]),
        grid=_grid(tensors, patch, given.image_size, where),
        d_mlp=tensors[f"blocks.0.mlp.{_MLPS[mlp]}.weight"].shape[0] // (2 if mlp == "packed" else 1),
        in_channels=in_channels,
        registers=registers,
        registers_name=registers_name,
        mlp=mlp,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        mask_token="mask_token" in tensors,
        local_norm="local_cls_norm.weight" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        masked_bias="blocks.0.attn.qkv.bias_mask" in tensors,
        proj_bias="blocks.0.attn.proj.bias" in tensors,
        ffn_bias=f"blocks.0.mlp.{_MLPS[mlp]}.bias" in tensors,
        periods=periods,
        eps=given.eps or (1e-5 if rotary else 1e-6),
        antialias=registers > 0,
        offset=0.0 if registers else 0.1,
        in_float32=second,
    )


_MLPS: dict[Any, str] = {"plain": "fc1", "packed": "w12", "split": "w1"}


def _heads(width: int, periods: int, given: int | None, where: object) -> int:
    by_periods = width // (4 * periods) if periods else None
    if by_periods and given not in (None, by_periods):
        raise InputError(f"{where} has {periods} rotary periods, so {by_periods} heads, not heads={given}.")
    heads = by_periods or given or width // D_HEAD
    if not heads or width % heads or (not by_periods and not given and width % D_HEAD):
        raise InputError(f"{where} has {width} channels, which are not {given or 'heads of 64'}: give heads=NUMBER.")
    return heads


def _grid(
    tensors: Mapping[str, Tensor], patch: list[int], image_size: int | tuple[int, int] | None, where: object
) -> tuple[int, int]:
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if "pos_embed" in tensors:
        patches = tensors["pos_embed"].shape[1] - 1
        side = math.isqrt(patches)
        if side * side != patches:
            raise LoadError(f"{where} has positions for {patches} patches, which are no square. {INSTEAD}")
        if size not in (None, (side * patch[0], side * patch[1])):
            raise InputError(
                f"{where} has positions for {side * patch[0]} pixels a side. Load it without image_size=: "
                "it takes images of other sizes all the same."
            )
        return side, side
    height, width = size or (224, 224)
    if height % patch[0] or width % patch[1]:
        asked = f"image_size={image_size}" if image_size else "224, the image_size unless given,"
        raise InputError(f"{asked} is no multiple of {where}'s patches of {patch[0]}: give image_size= one that is.")
    return height // patch[0], width // patch[1]


def build(tensors: Mapping[str, Tensor], where: object, given: Options) -> MetaViT:
    """Return the module with a backbone's tensors in it, every one accounted for; heads are left out.

    Args:
        where: the file, for messages.
        given: options instead of the rules.

    Raises:
        LoadError: tensors are missing, of another shape, or of a kind that is not supported.
        InputError: an option that the file contradicts, or one that it needs.
    """
    backbone = {name: tensor for name, tensor in tensors.items() if not HEADS.fullmatch(name)}
    with torch.device("meta"):
        model = MetaViT(architecture(backbone, where, given))
    real = {name: tensor for name, tensor in backbone.items() if tensor.is_floating_point() and tensor.itemsize > 1}
    unset = [name for name, tensor in real.items() if not bool(torch.isfinite(tensor).all())]
    if unset:
        raise LoadError(
            f"{where} holds values that are NaN or infinite, in {', '.join(unset[:3])}. "
            "Masks of biases are NaN until the model is initialised: was it saved before?"
        )
    check_shapes(backbone, model.state_dict(), where, INSTEAD)
    model.load_state_dict(backbone, strict=True, assign=True)
    return model.eval()
