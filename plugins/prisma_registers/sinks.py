"""Register neurons: the few MLP neurons that write outlier norms."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from prisma_core import HookedViT, InputError, NotApplicable
from prisma_core.plugin import Count, checked
from prisma_registers.norms import TokenNorms, check_images, check_vit, token_norms


class Neuron(NamedTuple):
    """One MLP neuron.

    Attributes:
        layer, index: where it is.
        score: the mean size of its activation at outlier patches, whatever its sign.
        elsewhere: the same at the other patches.
    """

    layer: int
    index: int
    score: float = 0.0
    elsewhere: float = 0.0


@checked
@torch.no_grad()
def register_neurons(
    model: HookedViT,
    images: Float[Tensor, "batch channel height width"],
    *,
    top: Count = 10,
    norms: TokenNorms | None = None,
    cutoff: float | None = None,
    factor: float | None = None,
    batch_size: Count = 32,
    progress: bool = False,
) -> list[Neuron]:
    """Return the neurons that are most active at outlier patches, up to the layer after which patches are outliers.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-reg")
    >>> [neuron.layer for neuron in register_neurons(model, torch.rand(4, 3, 96, 96), top=2, factor=1.01)]
    [0, 0]

    Args:
        model: any hooked vision transformer with an MLP in its layers.
        images: ``[batch channel height width]``; a few dozen are enough.
        top: how many neurons.
        norms: ``token_norms`` of the same images, where they are at hand.
        cutoff, factor: what an outlier is (see ``TokenNorms.outliers``).
        batch_size: how many images to run at once.
        progress: show a bar.

    Raises:
        InputError: there is no image, or cutoff and factor say nothing (see ``TokenNorms.outliers``).
        NotApplicable: no patch of these images is an outlier, or no MLP comes before one.

    Neurons of gated MLPs are active with either sign, so what counts is the size.

    Source: "Vision transformers don't need trained registers" (Jiang et al. 2025), section 3.
    """
    check_vit(model)
    check_images(images)
    norms = norms or token_norms(model, images, batch_size=batch_size, progress=progress)
    if norms.norms.shape[:2] != (len(model.blocks), len(images)):
        raise InputError(
            f"Expected norms of these {len(images)} images after {len(model.blocks)} blocks, got those of "
            f"{norms.norms.shape[1]} after {norms.norms.shape[0]}."
        )
    first = norms.first_layer(cutoff=cutoff, factor=factor)
    if first is None:
        raise NotApplicable(
            f"No patch is an outlier in these images (cutoff={cutoff}, factor={factor}): there are no register neurons "
            "to find."
        )
    # Outliers stay once they are there: where the norm is largest at the end of the chosen layer is where they are.
    patches = norms.layout.slice("patches")
    outlying = norms.outliers(cutoff=cutoff, factor=factor)[first][:, patches]
    names = [f"blocks.{layer}.mlp.hook_post" for layer in range(first + 1) if model.spec.blocks[layer].mlp is not None]
    if not names:
        raise NotApplicable(
            f"No layer up to {first} has an MLP, and patches are outliers behind it: no neuron wrote them."
        )
    sums: dict[str, Tensor] = {}
    for part, mask in track(
        list(zip(images.split(batch_size), outlying.split(batch_size), strict=True)),
        "neurons",
        disable=not progress,
        transient=True,
    ):
        _, cache = model.run_with_cache(part, names=names, output=False)
        for name in names:
            acts = cache[name][:, patches].double().abs()
            both = torch.stack([acts[mask].sum(0), acts[~mask].sum(0)])
            sums[name] = sums.get(name, 0) + both
    counts = torch.stack([outlying.sum(), (~outlying).sum()]).clamp(min=1)
    candidates = [
        Neuron(int(name.split(".")[1]), index, float(means[0, index]), float(means[1, index]))
        for name, total in sums.items()
        for means in [total / counts.to(total.device)[:, None]]
        for index in means[0].topk(min(top, means.shape[1])).indices.tolist()
    ]
    return sorted(candidates, key=lambda neuron: -neuron.score)[:top]
