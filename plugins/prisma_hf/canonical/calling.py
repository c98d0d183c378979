"""Calls of transformers' image encoders that give the canonical transformer's output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prisma_core.plugin import float64_softmax, switched


def main_output(upstream: Any, image: Tensor) -> Tensor:
    """Return what a model is called for: logits where it has a head, else the last hidden state."""
    config = upstream.config
    size = config.image_size
    native = (size, size) if isinstance(size, int) else tuple(size)
    options: dict[str, Any] = {}
    if tuple(image.shape[2:]) != native and not _always_resizes(upstream):
        options["interpolate_pos_encoding"] = True
    output = upstream(image, **options)
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
    """Return the pixels that a model predicts, by patch, as they were before it put them together to an image."""
    apart = F.pixel_unshuffle(upstream(image).reconstruction, upstream.decoder[1].upscale_factor)
    return rearrange(apart, "b k r c -> b (r c) k")


def last_map(upstream: Any, image: Tensor) -> Tensor:
    """Return the last of a backbone's feature maps."""
    return upstream(image).feature_maps[-1]


def last_stream(upstream: Any, image: Tensor) -> Tensor:
    """Return the last of the streams that a model returns behind its blocks, each normed."""
    size = upstream.visual.embeddings.image_size
    return upstream(image, interpolate_pos_encoding=tuple(image.shape[2:]) != (size, size))[-1]


def patch_by_patch(upstream: Any, image: Tensor) -> Tensor:
    """Return the main output of a model that is handed each patch as a vector."""
    side = upstream.config.patch_size
    patches = rearrange(image, "b c (r p) (s q) -> b (r s) (p q c)", p=side, q=side)
    return upstream(patches).last_hidden_state


def packed(upstream: Any, image: Tensor) -> Tensor:
    """Return the main output, image by image, of a model that makes one sequence of all images."""
    output = upstream(image).last_hidden_state
    return output.reshape(len(image), -1, output.shape[-1])


@contextmanager
def images_apart(sequence: nn.Module) -> Iterator[None]:
    """Give a module the images that are packed into one sequence as a batch, for the time of the scope."""

    def unpack(_: nn.Module, args: tuple[Tensor], given: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
        (stream,), mask = args, given["attention_mask"]
        count = int((mask[0, 0, 0] == 0).sum())  # what the first patch may read: the patches of its image
        tables = tuple(table[:count] for table in given["position_embeddings"])
        batch = stream.reshape(-1, count, stream.shape[-1])
        return (batch,), {**given, "attention_mask": None, "position_embeddings": tables}

    handle = sequence.register_forward_pre_hook(unpack, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
