"""Hidden patches: for a masked autoencoder to fill in."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from prisma_core import HookedViT, NotApplicable
from prisma_core.plugin import Count, InputError, Share, checked, shown
from prisma_toy.model import normalise

GREY = 0.5


@checked
def draw_hidden(n: Count, patches: Count, share: Share, generator: torch.Generator) -> Tensor:
    """Return which patches of each image are hidden, as many in each: bools ``[batch patch]``."""
    order = torch.rand(n, patches, generator=generator).argsort(1)
    return order < round(share * patches)


@checked
def hide(image: Tensor, hidden: Tensor, patch: Count) -> Tensor:
    """Return images with their hidden patches grey.

    Args:
        image: pixels in 0..1: ``[batch channel height width]``.
        hidden: bools ``[batch patch]``.
        patch: the side of a patch in pixels.

    Raises:
        InputError: they do not fit together.
    """
    if (
        image.ndim != 4
        or any(side % patch for side in image.shape[2:])
        or hidden.shape != (len(image), image.shape[2] * image.shape[3] // patch**2)
        or hidden.dtype != torch.bool
    ):
        raise InputError(
            f"Expected images [batch channel height width], patches of {patch} pixels that fill them, and hidden "
            f"[batch patch] of torch.bool; got {shown(image)} and {shown(hidden)}."
        )
    rows = image.shape[-2] // patch
    grid = hidden.view(len(hidden), 1, rows, -1)
    return torch.where(grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3), GREY, image)


def to_patches(image: Tensor, patch: Count) -> Tensor:
    """Return the pixels of each patch, channel by channel: ``[batch patch pixel]``."""
    return rearrange(image, "b c (row h) (column w) -> b (row column) (c h w)", h=patch, w=patch)


def from_patches(patches: Tensor, patch: Count, size: int) -> Tensor:
    """Return the images that patches make: ``[batch patch pixel] -> [batch channel height width]``."""
    side = size // patch
    return rearrange(
        patches, "b (row column) (c h w) -> b c (row h) (column w)", row=side, column=side, h=patch, w=patch
    )


@checked
def reconstruct(model: HookedViT, image: Tensor, hidden: Tensor) -> Tensor:
    """Return images whose hidden patches a masked autoencoder has filled in, pixels in 0..1.

    Args:
        model: such as ``toy:mae-scenes``.
        image: pixels in 0..1: ``[batch channel height width]``.
        hidden: bools ``[batch patch]``; what they hide is not seen.

    Raises:
        NotApplicable: the model makes no pixels of patches.
        InputError: images and hidden patches do not fit together, or not the model.
    """
    if model.spec.pool.kind != "patches":
        raise NotApplicable(f"{model.reference or type(model).__name__} makes no pixels, as toy:mae-scenes does.")
    patch, size = model.spec.embed.patch[0], model.spec.image_size[0]
    with torch.no_grad():
        made = from_patches(model(normalise(hide(image, hidden, patch))), patch, size)
    seen = hide(image, hidden, patch)
    return torch.where(hide(torch.ones_like(image), hidden, patch) == 1, seen, (made / 2 + 0.5).clamp(0, 1))
