"""How transformers' image encoders are called for what the canonical transformer computes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from prisma_core.explicit import float64_softmax, switched


def call(upstream: Any, image: Tensor) -> Tensor:
    """Return an encoder's main output."""
    return CALLS.get(type(upstream).__name__, main_output)(upstream, image)


def main_output(upstream: Any, image: Tensor) -> Tensor:
    """Return what a model is called for: logits where it has a head, else the last hidden state."""
    config = upstream.config
    size = config.image_size
    native = (size, size) if isinstance(size, int) else tuple(size)
    given: dict[str, Any] = {}
    if tuple(image.shape[2:]) != native and not _always_resizes(upstream):
        given["interpolate_pos_encoding"] = True
    output = upstream(image, **given)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def _always_resizes(upstream: Any) -> bool:
    return "interpolate_pos_encoding" not in inspect.signature(type(upstream).forward).parameters


def unmasked(upstream: Any, image: Tensor) -> Tensor:
    """Return what a masked autoencoder's encoder makes of all patches, in their order, however many it is to hide."""
    down, across = upstream.embeddings.patch_embeddings.patch_size
    count = (image.shape[2] // down) * (image.shape[3] // across)
    noise = torch.arange(count, device=image.device).expand(len(image), -1)
    with switched([upstream.config], "mask_ratio", 0.0):
        return upstream(image, noise=noise, interpolate_pos_encoding=True).last_hidden_state


def unrounded(upstream: Any, image: Tensor) -> Tensor:
    """Return the main output of a class whose attention is explicit alone, with a softmax in float32."""
    with float64_softmax():
        return main_output(upstream, image)


def pixels(upstream: Any, image: Tensor) -> Tensor:
    """Return the pixels that a model predicts, by patch, as they were before it put them together to a picture."""
    apart = F.pixel_unshuffle(upstream(image).reconstruction, upstream.decoder[1].upscale_factor)
    return rearrange(apart, "b k r c -> b (r c) k")


def last_map(upstream: Any, image: Tensor) -> Tensor:
    """Return the last of a backbone's feature maps."""
    return upstream(image).feature_maps[-1]


CALLS = {
    "VitPoseBackbone": last_map,
    "ViTForMaskedImageModeling": pixels,
    "DeiTForMaskedImageModeling": pixels,
    "ViTMAEModel": unmasked,
    "GitVisionModel": unrounded,
}
