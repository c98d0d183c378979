"""Reconstructions along the training of a masked autoencoder."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, InputError, NotApplicable, Result
from prisma_core.plugin import Seed, Share, checked
from prisma_toy.masking import GREY, draw_hidden, hide, reconstruct
from prisma_toy.source import series


@checked
def reconstructions(
    image: Tensor, hidden: Tensor | None = None, *, name: str = "mae-scenes", share: Share = 0.6, seed: Seed = 0
) -> Result:
    """Return what each checkpoint of a masked autoencoder makes of images: ``[checkpoint batch channel row column]``.

    The head makes each patch's pixels of its own token, so checkpoints need no decoder beside them.

    >>> from prisma_toy import draw_scenes
    >>> made = reconstructions(draw_scenes(2, seed=1, size=48).image)
    >>> made.names("checkpoint")[:3], made.values.shape[1:], made.tensors["hidden"].shape
    (('0', '16', '32'), torch.Size([2, 3, 48, 48]), torch.Size([2, 48, 48]))

    Args:
        image: pixels in 0..1: ``[batch channel height width]``.
        hidden: bools ``[batch patch]``; None draws them.
        name: a bundled model that comes with a series.
        share: of patches that are hidden, where they are drawn.
        seed: of the drawing.

    Returns:
        Pixels in 0..1, what is visible as it was; ``tensors["hidden"]`` 1 for each hidden pixel ``[batch row column]``,
        ``tensors["masked"]`` the images as the model saw them, ``tensors["error"]`` the mean squared error of hidden
        pixels ``[checkpoint]``.

    Raises:
        NotApplicable: the model is no masked autoencoder, or comes with no series.
        InputError: ``hidden`` is of another shape.
    """
    steps = series(name)
    last = prisma.load(f"toy:{name}")
    if not steps or not isinstance(last, HookedViT) or last.spec.pool.kind != "patches":
        raise NotApplicable(f"toy:{name} is no masked autoencoder with checkpoints, such as toy:mae-scenes.")
    patch, n = last.spec.embed.patch[0], last.layout.n_patches
    if image.ndim != 4:
        raise InputError(f"Expected images [batch channel height width], got {list(image.shape)}.")
    if hidden is None:
        hidden = draw_hidden(len(image), n, share, torch.Generator().manual_seed(seed))
    if hidden.shape != (len(image), n):
        raise InputError(f"Expected hidden patches [{len(image)} {n}], got {list(hidden.shape)}.")
    masked = hide(image, hidden, patch)
    where = hide(torch.zeros_like(image), hidden, patch)[:, 0] == GREY
    models = (cast(HookedViT, prisma.load(f"toy:{name}@{step}")) for step in steps)
    made = torch.stack([reconstruct(model, image, hidden) for model in models])
    error = (made - image).square().mean(2)[:, where].mean(1)
    return Result(
        made,
        ("checkpoint", "batch", "channel", "row", "column"),
        {"checkpoint": tuple(map(str, steps))},
        technique="reconstructions",
        unit="pixels in 0..1",
        tensors={"hidden": where.float(), "masked": masked, "error": error},
        facts={"model": f"toy:{name}", "hidden_patches": int(hidden[0].sum()), "patch": patch},
    )
