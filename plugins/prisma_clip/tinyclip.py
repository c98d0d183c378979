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
import torch.nn.functional as F
from torch import Tensor, nn

from prisma_core.plugin import LoadError, depth_in, read_states

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
    states = read_states(path).values()
    return any(name.removeprefix("module.").startswith(WRAPPERS) for state in states for name in state)


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
            "layers": _layers(state, "visual.transformer.", path),
            "width": width,
            "head_width": width // _heads(width),
            "patch_size": patch,
        },
        "text_cfg": {
            "context_length": text_pos.shape[0],
            "vocab_size": vocabulary,
            "width": text_width,
            "heads": _heads(text_width),
            "layers": _layers(state, "transformer.", path),
        },
    }


def _layers(state: Mapping[str, Tensor], tower: str, path: object) -> int:
    return depth_in(state, f"{tower}resblocks.", path)


def _heads(width: int) -> int:
    """Return how many heads fill a width; 1 where none do, for then each block has its own number."""
    return 1 if width % HEAD else width // HEAD


# -------------------------------------------------------------------- automatic inheritance


def narrow(model: Any, state: Mapping[str, Tensor], path: object) -> None:
    """Give each block of open_clip's model as many heads and neurons as its weights have.

    Raises:
        LoadError: all heads or all neurons of a block were taken out, or a head is not of 64 channels.
    """
    for prefix, tower in (("visual.transformer.", model.visual.transformer), ("transformer.", model.transformer)):
        for index, block in enumerate(tower.resblocks):
            _narrow(block, state, f"{prefix}resblocks.{index}.", path)


class NarrowAttention(nn.Module):
    """Multi-head attention whose heads together are not as wide as the stream: some were taken out.

    Called as open_clip calls ``nn.MultiheadAttention``, step by step.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.head_dim = HEAD
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * heads * HEAD, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * heads * HEAD))
        self.out_proj = nn.Linear(heads * HEAD, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, HEAD)).transpose(1, 2)
            for x, weight, bias in zip(
                (query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
            )
        )
        scores = q * HEAD**-0.5 @ k.transpose(-2, -1)
        pattern = torch.softmax(scores if attn_mask is None else scores + attn_mask, dim=-1)
        return F.linear((pattern @ v).transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias), None


def _narrow(block: Any, state: Mapping[str, Tensor], prefix: str, path: object) -> None:
    try:
        projection, neurons = state[f"{prefix}attn.in_proj_weight"], state[f"{prefix}mlp.c_fc.weight"].shape[0]
    except KeyError as error:
        raise LoadError(
            f"{path} lacks {error}: a block without attention or without an MLP is not supported."
        ) from error
    rows, width = projection.shape
    if rows % (3 * HEAD):
        raise LoadError(
            f"{path}: {prefix}attn has {rows} rows, which are not the queries, keys and values of heads of 64."
        )
    if rows != 3 * width:
        block.attn = NarrowAttention(width, rows // (3 * HEAD))
    if neurons != block.mlp.c_fc.out_features:
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(width, neurons), nn.Linear(neurons, width)
