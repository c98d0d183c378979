"""CLIP's decomposition: an image's vector as a sum over layers, heads and patches, and what each is worth.

Equation:
    M(I) / |M(I)| = sum_{l,h,i} c[l,h,i] + (embeddings and MLPs) + constant, c the part that head h of layer l brings
    from token i, through the frozen norms and projection. Mean ablation replaces the parts of the layers up to l by
    their means over images. A text's map is m[i] = sum_{l,h} <c[l,h,i], text>.
Cost:
    One pass over the images; heads' parts ``[layer head image d_embed]`` are kept. A map is ``attribute`` by source.
Misleads:
    Direct effects alone. That ablating early layers changes little says that later ones pass their work on, not that
    they do nothing. Maps show from where heads bring what is like the text, also where the object is not.
Source:
    Gandelsman, Efros and Steinhardt, "Interpreting CLIP's Image Representation via Text-Based Decomposition" (2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from prisma_core import ActivationCache, HookedDual, HookedModel, InputError, NotApplicable, Result, attentions
from prisma_core.plugin import checked, shown
from prisma_lens.attribute import attribute, check_sum_of, head_inputs, names_for
from prisma_lens.bar import bar
from prisma_lens.covectors import check_total, lengths
from prisma_lens.inputs import as_batches, as_input
from prisma_lens.readouts import Target, at_token, cache_of, check_pooled, readout, token_read, tower_of


@checked
@torch.no_grad()
def head_outputs(
    model: HookedModel,
    images: Iterable[Tensor] | Tensor,
    *,
    progress: bool | None = None,
    pos: int | str | None = None,
) -> Result:
    """Return what each head of the vision tower adds to each image's vector: ``[layer head image d_embed]``.

    >>> import prisma_core as prisma, torch
    >>> clip = prisma.load("toy:clip-scenes")
    >>> head_outputs(clip, torch.rand(2, 3, 64, 64), progress=False).shape
    {'layer': 3, 'head': 4, 'image': 2, 'd_embed': 96}

    Args:
        model: a dual encoder, or a vision tower with an output.
        images: batches of images, or one.
        progress: show a bar; None shows one on a terminal.
        pos: the token whose output is read, of a model that gives out every token.

    Returns:
        The values, of vectors of unit length for a dual encoder; ``tensors["rest"]``: what embeddings, MLPs, biases
        and the constant add, ``[image d_embed]``. Together they sum to ``encode_image(..., normalize=True)``.

    Raises:
        NotApplicable: the tower's stream or output is no sum over heads.
        InputError: there are no images.
    """
    own, parts, rests = tower_of(model, "vision"), list[Tensor](), list[Tensor]()
    check_pooled(own, "vector of an image", pos)
    for batch, _ in bar(as_batches(images), "Images", progress):
        cache = cache_of(model, batch, lambda each: [*names_for(each, "head"), *names_for(each)])
        scale, token = unit_scale(model, cache), token_read(own, cache, pos)
        layers = list[Tensor]()
        for layer, block in enumerate(own.layers()):
            check_sum_of(layer, block, "ln1", "heads", "attn_out")
            heads = [
                torch.einsum("bphe,hed->hbpd", head_inputs(cache, layer, each), each.scaled(each.module.W_O))
                for each in attentions(block)
            ]
            layers.append(at_token(cache.project_stack(torch.cat(heads)), token) / scale)
        if len({len(each) for each in layers}) != 1:
            raise NotApplicable("The layers differ in their number of heads, so there is no [layer head] to return.")
        others = cache.project_stack(cache.decompose_resid(mode="mlp")).sum(0)
        biases = torch.stack([each.scaled(each.module.b_O) for b in own.layers() for each in attentions(b)]).sum(0)
        shape = (1, *cache["attn_out", -1].shape)
        others = at_token(others + cache.project_stack(biases.expand(shape))[0] + cache.logit_constant(), token)
        parts.append(torch.stack(layers).cpu())
        rests.append((others / scale).cpu())
        check_total(cache, parts[-1].flatten(0, 1), rests[-1:], (at_token(cache["hook_logits"], token) / scale).cpu())
    if not parts:
        raise InputError("There are no images.")
    values = torch.cat(parts, 2)
    return Result(
        values,
        ("layer", "head", "image", "d_embed"),
        {
            "layer": tuple(f"L{layer}" for layer in range(values.shape[0])),
            "head": tuple(f"H{head}" for head in range(values.shape[1])),
        },
        technique="head_outputs",
        unit="of the image's vector",
        total="the image's vector, with tensors['rest']",
        tensors={"rest": torch.cat(rests)},
    )


@checked
@torch.no_grad()
def mean_ablation(
    model: HookedModel,
    data: Iterable[Tensor] | Iterable[tuple[Tensor, Tensor]] | Tensor,
    target: Target,
    *,
    progress: bool | None = None,
    pos: int | str | None = None,
) -> Result:
    """Return how well images are classified when the parts of layers are replaced by their means: ``[kind layer]``.

    >>> import prisma_core as prisma, torch
    >>> clip = prisma.load("toy:clip-scenes")
    >>> mean_ablation(clip, torch.rand(4, 3, 64, 64), ["a red circle", "a blue star"], progress=False).shape
    {'kind': 2, 'layer': 3}

    Args:
        model: a dual encoder, or a classifier.
        data: batches of images, or of images and the index of the right text (or class) for each ``[batch]``.
        target: the texts, or classes, that are told apart (see ``readout``).
        progress: show a bar; None shows one on a terminal.
        pos: the token whose output is read, of a model that gives out every token.

    Returns:
        The accuracy with the attentions (``attn``) or MLPs (``mlp``) of all layers up to each ablated: of the given
        labels, or without them of the intact model's answers. ``facts["intact"]`` is that of the intact model.

    Raises:
        InputError: there are fewer than two images or targets, or labels that are no place among the targets.
        NotApplicable: the stream or the output is no sum of components.
    """
    own = tower_of(model, "vision")
    check_pooled(own, "answer to an image", pos)
    reading, stacks, truths = readout(model, target), list[Tensor](), list[Tensor]()
    labels: list[str] = []
    for images, truth in bar(as_batches(data), "Images", progress):
        cache = cache_of(model, images, names_for)
        parts, labels = cache.decompose_resid(return_labels=True)
        outputs, fixed = cache.project_stack(parts), cache.logit_constant()[None]  # constants are their own mean
        token = token_read(own, cache, pos)
        outputs = torch.cat([at_token(outputs, token), at_token(fixed, token).expand(1, len(images), -1)])
        check_total(cache, outputs, (), at_token(cache["hook_logits"], token))
        # Parts of vectors of unit length, as the equation has it: a long vector's must not weigh more in the mean.
        stacks.append(outputs / unit_scale(model, cache) @ reading.vectors.to(outputs).T)
        if truth is not None:
            truths.append(truth)
        n = stacks[-1].shape[1]
        if len(truths) not in (0, len(stacks)) or (truth is not None and truth.shape != (n,)):
            raise InputError(
                f"Expected a label for each image of every batch, or none at all: got {shown(truth)} for {n} images, "
                f"and labels of {len(truths)} of {len(stacks)} batches."
            )
    if not stacks or sum(each.shape[1] for each in stacks) < 2 or len(reading.labels) < 2:
        raise InputError(
            f"Expected at least two images, and two texts or classes to tell apart; got "
            f"{sum(each.shape[1] for each in stacks) or 'no images'}, and {len(reading.labels)}."
        )
    stack = torch.cat(stacks, 1)  # [component image class]
    intact = stack.sum(0).argmax(-1)  # biases, the same for all texts, change no answer
    truth = torch.cat(truths).to(intact.device) if truths else intact
    if truth.is_floating_point() or not bool(((truth >= 0) & (truth < len(reading.labels))).all()):
        raise InputError(
            f"Expected labels from 0 to {len(reading.labels) - 1}, places among the targets; got {shown(truth)}."
        )
    mean = stack.mean(1, keepdim=True).expand_as(stack)
    n = len(own.blocks)
    values = torch.full((2, n), float("nan"))
    for row, kind in enumerate(("attn", "mlp")):
        ablated = torch.zeros(len(stack), dtype=torch.bool, device=stack.device)
        for layer in range(n):
            if f"{layer}_{kind}_out" in labels:
                ablated[labels.index(f"{layer}_{kind}_out")] = True
            answers = (torch.where(ablated[:, None, None], mean, stack).sum(0)).argmax(-1)
            values[row, layer] = (answers == truth).float().mean()
    return Result(
        values,
        ("kind", "layer"),
        {"kind": ("attn", "mlp"), "layer": tuple(f"L{layer}" for layer in range(n))},
        technique="mean_ablation",
        unit="accuracy" if truths else "share of the intact model's answers",
        baseline="the direct effects of all layers up to this one replaced by their means over the images",
        facts={"intact": (intact == truth).float().mean().item(), "images": stack.shape[1]},
    )


@checked
def segment(
    model: HookedModel,
    images: Any,
    target: Target,
    *,
    against: Target | None = None,
    pos: int | str | None = None,
) -> Result:
    """Return a map of each text (or class) over the patches: ``[batch row column class]``, of a video with ``frame``.

    >>> import prisma_core as prisma, torch
    >>> clip = prisma.load("toy:clip-scenes")
    >>> segment(clip, torch.rand(1, 3, 64, 64), ["a red circle", "a blue star"]).shape
    {'batch': 1, 'row': 8, 'column': 8, 'class': 2}

    Args:
        model: a dual encoder, or a classifier.
        images: images, or a cache with ``names_for(model, "source")``.
        target, against, pos: texts or classes, and the token that is read, as in ``attribute``.

    Returns:
        What all heads bring from each patch along each text. ``values.argmax(-1)`` is the text of each patch.

    Raises:
        NotApplicable: as ``attribute``; or the model has no grid of patches.
    """
    own = tower_of(model, "vision")
    given = images if isinstance(images, ActivationCache) else as_input(own, images)
    found = attribute(model, given, target, against=against, by="source", pos=pos)
    layout = given.layout if isinstance(given, ActivationCache) else own.layout_for(given)
    if layout is None:
        raise NotApplicable("This model has no token layout, so its patches have no places.")
    values = layout.grid(found.values.sum(0), axis=0).movedim(-2, 0)
    axes = ("batch", *(["frame"] if layout.frames > 1 else []), "row", "column", "class")
    return Result(
        values,
        axes,
        {"class": found.names("class")},
        technique="segment",
        unit="logits",
        total="with what heads bring from other tokens, the part of the logit that heads write",
    )


def unit_scale(model: HookedModel, cache: Any) -> Tensor | float:
    """Return what outputs ``[batch out]`` are divided by: a dual encoder's lengths, 1 of other models."""
    return lengths(cache)[:, None] if isinstance(model, HookedDual) else 1.0
