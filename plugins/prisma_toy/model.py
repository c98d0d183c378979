"""Small transformers in canonical form, so every inside can be read from the first step of training on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prisma_core import HookedDual, HookedText, HookedViT, InputError, ModelSpec, TokenLayout, ZooModel
from prisma_core.plugin import (
    AttentionSpec,
    BlockSpec,
    DualSpec,
    EmbedSpec,
    MlpSpec,
    NormSpec,
    PoolSpec,
    Preprocess,
    TextPoolSpec,
    TextSpec,
    VideoPreprocess,
    checked,
)

if TYPE_CHECKING:
    from prisma_toy.config import Config
    from prisma_toy.task import Task
    from prisma_toy.words import Words

EPS = 1e-5


def block_spec(config: Config) -> BlockSpec:
    """Return the spec of each block of a toy.

    Raises:
        InputError: the widths do not fit together.
    """
    if config.d_model % config.heads:
        raise InputError(f"d_model={config.d_model} is not a multiple of heads={config.heads}: choose one that is.")
    ln = NormSpec(eps=EPS) if config.norm else None
    d_head = config.d_model // config.heads
    return BlockSpec(
        attn=AttentionSpec(n_heads=config.heads, n_kv_heads=config.heads, d_head=d_head, scale=d_head**-0.5),
        mlp=MlpSpec(d_mlp=round(config.d_model * config.mlp_ratio), act="gelu") if config.mlp_ratio else None,
        ln1=ln,
        ln2=ln if config.mlp_ratio else None,
    )


def pooling(config: Config) -> PoolSpec:
    """Return how the head reads the tokens.

    ``avg``: the mean of all tokens, so each patch casts a vote, and the logit lens of the last layer shows the votes.
    ``token``: the class token, which has to fetch what it says by attention.
    """
    return PoolSpec(kind="avg", with_prefix=True) if config.pool == "avg" else PoolSpec(kind="token")


def vision_spec(task: Task, config: Config, pool: PoolSpec, n_out: int) -> ModelSpec:
    """Return the spec of a transformer that reads a task's images or videos.

    Args:
        pool: what the head reads.
        n_out: how many numbers it makes of that.
    """
    side = task.size // task.patch
    frames = 1 if task.tubelet is None else task.frames // task.tubelet
    return ModelSpec(
        d_model=config.d_model,
        image_size=(task.size, task.size),
        embed=EmbedSpec(patch=(task.patch, task.patch), tubelet=task.tubelet, in_channels=task.channels),
        layout=TokenLayout(cls=1, registers=config.registers, frames=frames, rows=side, columns=side),
        blocks=(block_spec(config),) * config.layers,
        ln_final=NormSpec(eps=EPS) if config.norm else None,
        pool=pool,
        d_pool=config.d_model,
        n_classes=n_out,
    )


def text_spec(words: Words, config: Config, n_out: int) -> TextSpec:
    """Return the spec of a causal transformer that reads captions, and says what it has read at their end."""
    return TextSpec(
        d_model=config.d_model,
        n_vocab=len(words),
        n_ctx=words.length,
        causal=True,
        blocks=(block_spec(config),) * config.layers,
        ln_final=NormSpec(eps=EPS) if config.norm else None,
        pool=TextPoolSpec(kind="argmax"),
        n_classes=n_out,
    )


def vision_model(task: Task, spec: ModelSpec, seed: int) -> HookedViT:
    """Return a freshly initialised vision transformer; the same seed gives the same weights."""
    model = _initialised(HookedViT, spec, seed)
    model.preprocess, model.labels = preprocess(task), task.labels or None
    return model


def dual_model(task: Task, spec: DualSpec, words: Words, seed: int) -> HookedDual:
    """Return a freshly initialised dual encoder; the same seed gives the same weights."""
    model = _initialised(HookedDual, spec, seed)
    model.preprocess, model.tokenizer = preprocess(task), words
    return model


def preprocess(task: Task) -> Preprocess | VideoPreprocess:
    """Return what makes images or videos of a task's kind the tensor its models take, as ``normalise`` does."""
    half = (0.5,) * task.channels
    each = Preprocess(size=(task.size, task.size), interpolation="bilinear", mean=half, std=half)
    return each if task.tubelet is None else VideoPreprocess(frames=task.frames, each=each)


def _initialised(kind: Any, spec: ModelSpec | DualSpec, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):  # the parts initialise themselves first, which is nobody's business
        model = kind(spec)
    draw_weights(model, seed)
    return model


def draw_weights(model: ZooModel, seed: int) -> None:
    """Give a model the weights that training starts from.

    Keys start as queries do, so heads begin by looking at patches like their own, near it. From independent ones, small
    models learn colours fast and then take long to find that shapes matter.
    Source: Trockman and Kolter 2023, "Mimetic initialization of self-attention layers", simplified.
    """
    generator = torch.Generator().manual_seed(seed)
    for tower in model.towers().values():
        _draw_tower(tower, generator)
    if isinstance(model, HookedDual):
        nn.init.constant_(model.logit_scale, math.log(10.0))


def _draw_tower(model: ZooModel, generator: torch.Generator) -> None:
    spec: Any = model.spec
    depth = 1 / math.sqrt(2 * max(1, spec.n_layers))
    for name, parameter in model.named_parameters():
        if name == "embed.pos_embed" and isinstance(model, HookedViT):
            layout = spec.layout
            frames = () if spec.embed.tubelet is None else (layout.frames,)
            nn.init.zeros_(parameter)
            parameter.data[layout.n_prefix :] = waves((*frames, layout.rows, layout.columns), spec.d_model)
        elif name in ("embed.prefix", "head.weight"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        elif parameter.ndim >= 2:
            writes = name.endswith(("attn.out.weight", "mlp.fc_out.weight"))
            nn.init.xavier_uniform_(parameter.flatten(1), gain=depth if writes else 1.0, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    if isinstance(model, HookedText):
        return
    with torch.no_grad():
        for block in getattr(model, "blocks"):  # noqa: B009
            block.attn.W_K.copy_(block.attn.W_Q)


def waves(sides: tuple[int, ...], d_model: int, height: float = 0.5) -> Tensor:
    """Return sines and cosines of frame, row and column: where learned positions start: ``[patch d_model]``.

    From random positions a small model takes long to find out which patches are neighbours.
    """
    count = math.ceil(d_model / (2 * len(sides)))
    rates = math.pi / 2 ** torch.linspace(0, 1 + math.log2(max(sides)), count)
    places = torch.meshgrid(*(torch.arange(side).float() for side in sides), indexing="ij")
    turns = [place.flatten()[:, None] * rates for place in places]
    table = torch.cat([wave(turn) for turn in turns for wave in (torch.sin, torch.cos)], dim=1)
    return height * table[:, :d_model]


@checked
def normalise(image: Tensor) -> Tensor:
    """Return pixels in 0..1 as a toy model takes them, just as its ``preprocess`` would.

    >>> normalise(torch.tensor([0., 0.5, 1.]))
    tensor([-1.,  0.,  1.])
    """
    return image * 2 - 1
