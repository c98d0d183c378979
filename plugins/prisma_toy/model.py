"""Small vision transformers of our own: Prisma's HookedViT, so every inside can be read from the first step on."""

from __future__ import annotations

import math

import torch
from torch import nn

from prisma_core import HookedViT, InputError, ModelSpec, TokenLayout
from prisma_core.plugin import AttentionSpec, BlockSpec, EmbedSpec, MlpSpec, NormSpec, PoolSpec, Preprocess
from prisma_toy.tasks import Task


def toy_spec(
    task: Task,
    *,
    layers: int,
    d_model: int,
    heads: int,
    mlp_ratio: float = 2.0,
    norm: bool = True,
    pool: str = "avg",
    registers: int = 0,
) -> ModelSpec:
    """Return the facts of a toy vision transformer.

    Args:
        pool: what the head reads. ``avg``: the mean of all tokens, so each patch casts a vote, and the logit lens of
            the last layer shows the votes. ``token``: the class token, which has to fetch what it says by attention.
        registers: learned tokens behind the class token that nothing reads but attention.
        mlp_ratio: the MLP's width over ``d_model``; 0 for a model of attention alone.
        norm: whether there are layer norms, in blocks and before the head.

    Raises:
        InputError: the widths do not fit together.
    """
    if d_model % heads:
        raise InputError(f"d_model={d_model} is not a multiple of heads={heads}: choose one that is.")
    ln = NormSpec(eps=1e-5) if norm else None
    d_head = d_model // heads
    block = BlockSpec(
        attn=AttentionSpec(n_heads=heads, n_kv_heads=heads, d_head=d_head, scale=d_head**-0.5),
        mlp=MlpSpec(d_mlp=round(d_model * mlp_ratio), act="gelu") if mlp_ratio else None,
        ln1=ln,
        ln2=ln if mlp_ratio else None,
    )
    side = task.size // task.patch
    return ModelSpec(
        d_model=d_model,
        image_size=(task.size, task.size),
        embed=EmbedSpec(patch=(task.patch, task.patch), in_channels=task.channels),
        layout=TokenLayout(cls=1, registers=registers, rows=side, columns=side),
        blocks=(block,) * layers,
        ln_final=ln,
        pool=PoolSpec(kind="avg", with_prefix=True) if pool == "avg" else PoolSpec(kind="token"),
        d_pool=d_model,
        n_classes=len(task.labels),
    )


def toy_model(task: Task, spec: ModelSpec, seed: int) -> HookedViT:
    """Return a freshly initialised model; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):  # the parts initialise themselves first, which is nobody's business
        model = HookedViT(spec)
    draw_weights(model, seed)
    model.preprocess = Preprocess(
        size=(task.size, task.size),
        interpolation="bilinear",
        mean=(0.5,) * task.channels,
        std=(0.5,) * task.channels,
    )
    model.labels = task.labels
    return model


def draw_weights(model: HookedViT, seed: int) -> None:
    """Give a model the weights that training starts from.

    Keys start as queries do, so heads begin by looking at patches like their own, near it. From independent ones, small
    models learn colours fast and then take long to find that shapes matter.
    Source: Trockman and Kolter 2023, "Mimetic initialization of self-attention layers", simplified.
    """
    spec = model.spec
    generator = torch.Generator().manual_seed(seed)
    depth = 1 / math.sqrt(2 * max(1, spec.n_layers))
    for name, parameter in model.named_parameters():
        if name == "embed.pos_embed":
            nn.init.zeros_(parameter)
            parameter.data[spec.layout.n_prefix :] = waves(spec.layout.rows, spec.layout.columns, spec.d_model)
        elif name in ("embed.prefix", "head.weight"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif parameter.ndim >= 2:
            writes = name.endswith(("attn.out.weight", "mlp.fc_out.weight"))
            nn.init.xavier_uniform_(parameter.flatten(1), gain=depth if writes else 1.0, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_K.copy_(block.attn.W_Q)


def waves(rows: int, columns: int, d_model: int, height: float = 0.5) -> torch.Tensor:
    """Return sines and cosines of row and column: where learned positions start: ``[patch d_model]``.

    From random positions a small model takes long to find out which patches are neighbours.
    """
    count = math.ceil(d_model / 4)
    rates = math.pi / 2 ** torch.linspace(0, 1 + math.log2(max(rows, columns)), count)
    row, column = torch.meshgrid(torch.arange(rows).float(), torch.arange(columns).float(), indexing="ij")
    turns = [place.flatten()[:, None] * rates for place in (row, column)]
    table = torch.cat([wave(turn) for turn in turns for wave in (torch.sin, torch.cos)], dim=1)
    return height * table[:, :d_model]


def normalise(image: torch.Tensor) -> torch.Tensor:
    """Return pixels in 0..1 as a toy model takes them, just as its ``preprocess`` would."""
    return image * 2 - 1
