"""TinyCLIP's original checkpoints: open_clip's tensors inside wrappers of TinyCLIP's own training code.

The form: ``{"state_dict": ...}`` whose keys begin with ``_image_encoder.visual.``, ``_text_encoder.`` and
``_logit_scale.``, with ``module.`` before or behind each wherever training ran in parallel. Older ones lack the
wrappers.

Source: the folder TinyCLIP of Microsoft's repository Cream, ``src/open_clip/model.py``; "TinyCLIP: CLIP Distillation
via Affinity Mimicking and Weight Inheritance" (Wu et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prisma_core.errors import LoadError
from prisma_core.files import read_checkpoint

HEAD = 64  # channels of a head: TinyCLIP's configurations know no other
PARTS = ("image_encoder", "text_encoder", "logit_scale")
WRAPPERS = (*(f"_{part}." for part in PARTS), *(f"{part}_without_ddp." for part in PARTS))
# What old checkpoints of OpenAI's and TinyCLIP's carry besides weights.
CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with open_clip's keys, whatever training code wrapped around them.

    Raises:
        LoadError: two keys become one.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = _plain(name)
        if plain in found and not torch.equal(found[plain], tensor):
            raise LoadError(f"The checkpoint holds {plain} twice, with different numbers.")
        found[plain] = tensor
    return found


def _plain(name: str) -> str:
    before = ""
    while before != name:
        before = name
        name = name.removeprefix("module.")
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
    return name


def is_one(path: str | Path) -> bool:
    """Return whether a file holds weights in TinyCLIP's wrappers."""
    return any(name.removeprefix("module.").startswith(WRAPPERS) for name in read_checkpoint(path))


def load(path: str | Path, **options: Any) -> nn.Module:
    """Return open_clip's model of an original checkpoint, its facts read from the shapes of the weights.

    Raises:
        LoadError: the file cannot be read safely, or its weights are not those of a transformer with heads of 64.
    """
    from prisma_clip.source import _create_from, _fill  # pyright: ignore[reportPrivateUsage]

    state = unwrapped(read_checkpoint(path))
    model = _create_from({"model_cfg": config(state, path)}, options)
    _fill(model, path, sizes=bool(options))
    return model


def config(state: Mapping[str, Tensor], path: object = "the checkpoint") -> dict[str, Any]:
    """Return the configuration that the shapes of open_clip's tensors imply.

    Raises:
        LoadError: they are of another architecture.
    """
    try:
        patches, projection = state["visual.conv1.weight"], state["visual.proj"]
        vision_pos, text_pos = state["visual.positional_embedding"], state["positional_embedding"]
        vocabulary = state["token_embedding.weight"].shape[0]
    except KeyError as error:
        raise LoadError(
            f"{path} lacks {error}: not the weights of a vision transformer and a text transformer. "
            "TinyCLIP's models with a ResNet are not supported."
        ) from error
    width, patch = patches.shape[0], patches.shape[-1]
    grid = round((vision_pos.shape[0] - 1) ** 0.5)
    text_width = text_pos.shape[1]
    return {
        "embed_dim": projection.shape[1],
        "vision_cfg": {
            "image_size": grid * patch,
            "layers": _layers(state, "visual.transformer."),
            "width": width,
            "head_width": min(HEAD, width),
            "mlp_ratio": _ratio(state, "visual.transformer.", width),
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": text_pos.shape[0],
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": max(1, text_width // HEAD),
            "layers": _layers(state, "transformer."),
            "mlp_ratio": _ratio(state, "transformer.", text_width),
        },
    }


def _layers(state: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}resblocks."
    return 1 + max(int(name.removeprefix(prefix).partition(".")[0]) for name in state if name.startswith(prefix))


def _ratio(state: Mapping[str, Tensor], tower: str, width: int) -> float:
    return state[f"{tower}resblocks.0.mlp.c_fc.weight"].shape[0] / width
