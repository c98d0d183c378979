"""Second-order effects of neurons: what a neuron adds to the output through the attention of later layers.

Equation:
    e[l, n] = sum_{l' > l} sum_i post[i, n] <W_out[n], u_{l'}[i]>, and u_{l'}[i] = ln1^T(sum_h sum_q pattern[q, i]
    (g[q] W_O^T) W_V^T), g the frozen path from the end of the stream to the reading. Patterns, scales of norms and what
    later MLPs and heads write in between are frozen: one attention lies on the path, no more.
Cost:
    One pass with all patterns and neurons; for each class one product with W_V, W_O and W_out of each layer.
Misleads:
    Frozen patterns: what a neuron does to queries and keys is not counted, nor paths through two layers.
Source:
    Gandelsman, Efros and Steinhardt, "Interpreting the Second-Order Effects of Neurons in CLIP" (2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prisma_core import HookedModel, InputError, NotApplicable, Result, attentions, mlps
from prisma_core.plugin import Indices, checked
from prisma_lens.attribute import check_linear_in_values, check_sum_of, names_for
from prisma_lens.covectors import covectors
from prisma_lens.decomposition import unit_scale
from prisma_lens.readouts import (
    Target,
    TowerName,
    at_token,
    cache_of,
    check_pooled,
    readout,
    refuse_open,
    token_read,
    tower_of,
)


@checked
@torch.no_grad()
def second_order(
    model: HookedModel,
    given: Any,
    target: Target,
    *,
    against: Target | None = None,
    tower: TowerName = "vision",
    labels: Sequence[str] | None = None,
    pos: int | str | None = None,
) -> Result:
    """Return what each neuron adds to a reading through later attention: ``[layer neuron batch class]``.

    >>> import prisma_core as prisma, torch
    >>> clip = prisma.load("toy:clip-scenes")
    >>> second_order(clip, torch.rand(1, 3, 64, 64), "a red circle").shape
    {'layer': 3, 'neuron': 192, 'batch': 1, 'class': 1}

    Args:
        model: a dual encoder, a classifier, or a tower.
        given: images, or a cache of them that holds ``second_order_names(model)``.
        target, against, tower, labels: as in ``attribute``.
        pos: the token whose output is read, of a model that gives out every token.

    Raises:
        NotApplicable: a norm stands between heads or neurons and the stream, the model has no MLPs, or a scope is open
            on the path from neurons to the output.
        UnknownName, InputError: as in ``attribute``.
    """
    own = tower_of(model, tower)
    check_pooled(own, "reading that neurons add to", pos)
    _check_open(own)
    reading = readout(model, target, against, tower=tower, labels=labels)
    cache = cache_of(model, given, second_order_names, tower)
    for layer, block in enumerate(own.layers()):
        check_sum_of(layer, block, "ln1", "heads", "attn_out")
        check_sum_of(layer, block, "ln2", "neurons", "mlp_out")
        if not mlps(block):
            raise NotApplicable(f"Layer {layer} has no MLP, so it has no neurons.")
    columns = list[Tensor]()
    for g in covectors(cache, reading, token_read(own, cache, pos)):
        through, rows = torch.zeros_like(g), list[Tensor]()
        for layer in reversed(range(len(own.blocks))):
            block = own.layers()[layer]
            added = [
                torch.einsum(
                    "bpn,bpn->nb", cache[f"blocks.{layer}.{each.name}.hook_post"].to(g), through @ _out(each, g).T
                )
                for each in mlps(block)
            ]
            rows.append(torch.cat(added))
            through = through + _back(cache, layer, block, g)
        if len({len(row) for row in rows}) != 1:
            raise NotApplicable("The layers differ in their number of neurons, so there is no one table of them.")
        columns.append(torch.stack(rows[::-1]))
    values = torch.stack(columns, -1)
    return Result(
        values,
        ("layer", "neuron", "batch", "class"),
        {
            "layer": tuple(f"L{layer}" for layer in range(values.shape[0])),
            "neuron": tuple(f"N{neuron}" for neuron in range(values.shape[1])),
            "class": reading.labels,
        },
        technique="second_order",
        unit="logits",
        total="the effect of all neurons through one later attention, patterns and norms frozen",
        facts={"tower": tower},
    )


@checked
@torch.no_grad()
def neuron_outputs(
    model: HookedModel, images: Any, layer: int, neurons: Indices, *, pos: int | str | None = None
) -> Result:
    """Return what neurons add to each image's vector through later attention: ``[neuron image d_embed]``.

    ``textspan(result.values[0], clip.encode_text(texts, normalize=True))`` names the first of them.

    >>> import prisma_core as prisma, torch
    >>> clip = prisma.load("toy:clip-scenes")
    >>> neuron_outputs(clip, torch.rand(2, 3, 64, 64), 0, [3, 7]).shape
    {'neuron': 2, 'image': 2, 'd_embed': 96}

    Args:
        model: a dual encoder, or a vision tower.
        images: images, or a cache that holds ``second_order_names(model)``.
        layer: of the neurons; negative ones count from the end.
        neurons: which.
        pos: as in ``second_order``.

    Raises:
        InputError: there is no such layer or neuron.
        NotApplicable: as ``second_order``.
    """
    own = tower_of(model, "vision")
    check_pooled(own, "vector that neurons add to", pos)
    _check_open(own)
    n = len(own.blocks)
    if not -n <= layer < n:
        raise InputError(f"No layer {layer}: there are {n}.")
    layer, cache = layer % n, cache_of(model, images, second_order_names)
    branches = mlps(own.layers()[layer])
    if len(branches) != 1:
        raise NotApplicable(f"Layer {layer} has {len(branches)} MLPs, so its neurons are not counted through.")
    check_sum_of(layer, own.layers()[layer], "ln2", "neurons", "mlp_out")
    post = cache[f"blocks.{layer}.{branches[0].name}.hook_post"]
    if not all(0 <= each < post.shape[-1] for each in neurons):
        raise InputError(f"Expected neurons from 0 to {post.shape[-1] - 1}, got {list(neurons)}.")
    vectors, token = _out(branches[0], post), token_read(own, cache, pos)
    outputs = list[Tensor]()
    for neuron in neurons:
        x = post[..., neuron, None] * vectors[neuron]
        total = torch.zeros_like(x)
        for later in range(layer + 1, n):
            block = own.layers()[later]
            check_sum_of(later, block, "ln1", "heads", "attn_out")
            for branch, norm in zip(attentions(block), _norms(block), strict=True):
                y = norm.linear(x, cache[f"{_path(later, branch)}.hook_scale"]) if norm is not None else x
                v = torch.einsum("bpd,hde->bphe", y, _values(later, branch, y))
                z = torch.einsum("bhqk,bkhe->bqhe", cache[f"blocks.{later}.{branch.name}.hook_pattern"], v)
                total += torch.einsum("bqhe,hed->bqd", z, branch.scaled(branch.module.W_O).to(z))
        outputs.append(at_token(cache.project_stack(total[None])[0], token) / unit_scale(model, cache))
    return Result(
        torch.stack(outputs),
        ("neuron", "image", "d_embed"),
        {"neuron": tuple(f"L{layer}N{neuron}" for neuron in neurons)},
        technique="neuron_outputs",
        unit="of the image's vector",
        facts={"layer": layer},
    )


@checked
def second_order_names(model: HookedModel, tower: TowerName = "vision") -> list[str]:
    """Return the hook points that a cache of a tower must hold for ``second_order``.

    >>> import prisma_core as prisma
    >>> len(second_order_names(prisma.load("toy:clip-scenes")))
    16
    """
    own = tower_of(model, tower)
    wanted = [*names_for(own, "neuron")]
    for layer, block in enumerate(own.layers()):
        for branch in attentions(block):
            wanted += [f"blocks.{layer}.{branch.name}.hook_pattern", f"{_path(layer, branch)}.hook_scale"]
    points = own.hook_points()
    return [name for name in wanted if name in points]


def _check_open(own: Any) -> None:
    """Refuse hooks on the path from neurons to the output, which is computed from weights."""
    freely = ("hook_q", "hook_k", "hook_q_input", "hook_k_input", "hook_rot_q", "hook_rot_k", "hook_attn_scores")
    freely += ("hook_pattern", "hook_scale", "ln2.hook_normalized", "hook_pre", "hook_pre_linear", "hook_post")
    names = [*own.hook_points()]
    within = names[names.index("blocks.0.hook_resid_pre") :]
    refuse_open(own, [name for name in within if not name.endswith(freely)], "the path from neurons on is computed")


def _back(cache: Any, layer: int, block: Any, g: Tensor) -> Tensor:
    """Return the covector of the stream before a block, through its attention alone: ``[batch pos d_model]``."""
    total = torch.zeros_like(g)
    for branch, norm in zip(attentions(block), _norms(block), strict=True):
        along = torch.einsum("bqd,hed->bhqe", g, branch.scaled(branch.module.W_O).to(g))
        pattern = cache[f"blocks.{layer}.{branch.name}.hook_pattern"].to(g)
        arrived = torch.einsum("bhqk,bhqe->bhke", pattern, along)
        u = torch.einsum("bhke,hde->bkd", arrived, _values(layer, branch, g))
        if norm is not None:
            scale = norm.divisor(cache[f"{_path(layer, branch)}.hook_scale"])
            u = norm.centred(u * norm.weight.to(u) / scale).to(g)  # the transpose of Norm.linear
        total = total + u
    return total


def _values(layer: int, branch: Any, like: Tensor) -> Tensor:
    """Return W_V of every head, where its values reach the stream linearly: ``[head d_model d_head]``."""
    check_linear_in_values(layer, branch)
    w_v = branch.module.W_V.to(like)
    return w_v.repeat_interleave(branch.module.spec.n_heads // len(w_v), 0)


def _out(branch: Any, like: Tensor) -> Tensor:
    return branch.scaled(branch.module.W_out).to(like)


def _norms(block: Any) -> list[Any]:
    """Return the norm before each attention of a block, None where there is none."""
    norms = list(block.ln1) if isinstance(block.ln1, nn.ModuleList) else [block.ln1]
    reads = block.spec.kind in ("pre", "parallel")
    return [norm if reads and hasattr(norm, "linear") else None for norm in norms]


def _path(layer: int, branch: Any) -> str:
    return f"blocks.{layer}.{branch.name.replace('attn', 'ln1')}"
