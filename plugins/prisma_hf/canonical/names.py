"""Names of parts in each of transformers' classes. Facts are read off the parts; only their places stand here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from prisma_hf.canonical.calling import main_output

Prefix = Literal["cls", "distillation", "registers"]


@dataclass(frozen=True)
class BlockNames:
    """Names of a block's parts, as paths from the block; empty where it has none.

    Attributes:
        attn: the module in whose forward the softmax is taken.
        heads, scale: attributes of ``attn``; without ``scale`` it is one over the root of a head's width.
        width: an attribute of ``attn`` that holds a head's width, where none counts the heads.
        q, k, v: projections; or ``qkv``, one for all, its rows in that order.
        mha: whether ``attn`` is torch's own attention instead, which holds all of them.
        ls1, ls2: parameters of layer scale.
        act: the activation function.
        bias: the module whose table is added to the scores.
        q_norm, k_norm: norms of queries and keys.
        normed_apart: they see each head apart: batch, head, position, channel.
        rot_q, rot_k: the places of what is turned by its position; without them, what is multiplied.
        mlp: the MLP, which may be a gated one with projections ``gate_proj``, ``up_proj`` and ``down_proj`` instead.
        single: an attribute that counts experts, of which there must be one.
        absent: modules that must be identities.
        addend: the place of what attention adds to the stream, where that is not the output of ``out``.
        axes: the first axes of upstream's stream: batch and position, the other way round, or both as one.
        out_axes: those of what ``out`` reads, where they are others.
        attn_out, mlp_out: the places of what is added to the stream where there is layer scale.
    """

    attn: str = "self_attn"
    heads: str = "num_heads"
    scale: str = "scale"
    width: str = ""
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    mha: bool = False
    out: str = "self_attn.out_proj"
    ln1: str = "layer_norm1"
    ln2: str = "layer_norm2"
    fc1: str = "mlp.fc1"
    act: str = "mlp.activation_fn"
    fc2: str = "mlp.fc2"
    ls1: str = ""
    ls2: str = ""
    bias: str = ""
    q_norm: str = ""
    k_norm: str = ""
    normed_apart: bool = False
    rot_q: str = ""
    rot_k: str = ""
    mlp: str = "mlp"
    single: str = ""
    absent: tuple[str, ...] = ()
    addend: str = ""
    axes: Literal["b p", "p b", "(batch p)"] = "b p"
    out_axes: Literal["", "b p", "p b"] = ""
    attn_out: str = ""
    mlp_out: str = ""


@dataclass(frozen=True)
class TowerNames:
    """Names of an encoder's parts, as paths from it; empty where it has none.

    Attributes:
        blocks: the list of blocks.
        proj: the patch projection.
        flat: the order of a patch's pixels (``p q c``: row, column, channel) where upstream is handed each patch as a
            vector, and ``patch``, the side of a patch there.
        packed: the module that is handed all images of a batch as one sequence.
        listed: upstream itself is handed their patches so, with the grid of each: as they are, row by row, or shown in
            several frames, each as a vector, in an order that its caller chooses.
        stem: the module from images to patches, where it is more than that projection.
        image: the attribute that holds the size of image; without it, the one that there are positions for.
        prefix: tokens before the patches, each kind with its parameter.
        embed_norm: a norm of the patch embedding.
        pos: the position embedding, of all tokens.
        pos_without_registers: there are none for registers, which come in later.
        pos_and_first: the first position, which is no patch's, is added to those of all patches.
        looked_up: upstream computes which of its positions a patch takes.
        rope: the module that makes the tables by which queries and keys turn, ``rope_of``, what it makes them of, and
            ``rope_cls``, the angles of the class token; other tokens before the patches do not turn.
        rope_sizes: what patches are counted by where those tables follow other sizes of image (``RopeGrid``).
        rope_apart: rows and columns turn by waves of their own, half of what it holds each.
        rope_in_float32: queries and keys turn in float32, whatever they are.
        last: the place of the main output, where the final norm is called again later.
        ln_each: final norms, one behind each block, where there is such a list; without it ``ln_final`` is called once,
            for the streams behind all blocks.
        refused: attributes that must not be set, each with what it brings.
        side: the attribute that upstream divides the sides of an image of another size by: a number, or it cannot.
            Empty where it can divide by anything.
        resize: whether upstream's positions follow other sizes of image: ``asked``, if the caller says so;
            ``always``; or ``never``.
        mode, antialias: of that interpolation.
        resampler: the module that says how, where positions are weighed one by one.
        resize_float32: in float32, whatever they are.
        bias: the module whose table is added to the scores of all blocks.
        ignored: tensors that its main output does not depend on, each with the reason.
    """

    block: BlockNames
    blocks: str = "layers"
    proj: str = "embeddings.patch_embeddings.projection"
    stem: str = ""
    flat: str = ""
    patch: str = ""
    packed: str = ""
    listed: Literal["", "patches", "frames"] = ""
    image: str = "embeddings.patch_embeddings.image_size"
    prefix: tuple[tuple[Prefix, str], ...] = (("cls", "embeddings.cls_token"),)
    embed_norm: str = ""
    pos: str = "embeddings.position_embeddings"
    pos_without_registers: bool = False
    pos_and_first: bool = False
    looked_up: bool = False
    rope: str = ""
    rope_of: Literal["positions", "image"] = "positions"
    rope_cls: str = ""
    rope_sizes: Literal["", "index", "radians"] = ""
    rope_apart: bool = False
    rope_in_float32: bool = False
    last: str = ""
    ln_pre: str = ""
    ln_final: str = "layernorm"
    ln_each: str = ""
    refused: dict[str, str] = field(default_factory=dict[str, str], hash=False)
    side: str = "embeddings.patch_size"
    resize: Literal["asked", "always", "never"] = "asked"
    mode: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = False
    resampler: str | None = None
    resize_float32: bool = False
    bias: str = ""
    ignored: dict[str, str] = field(default_factory=dict[str, str], hash=False)


@dataclass(frozen=True)
class ModelNames:
    """A class of transformers: its encoder, and what comes after it.

    Attributes:
        at: the path of the encoder.
        head, head_dist: linear layers that return the logits; two: the mean of both. A head over patches may be a
            convolution of single patches.
        pool: what the head reads.
        ln_pool: the norm of what it reads; where upstream has None there, the head reads the first token.
        call: the call that returns the main output.
    """

    tower: TowerNames
    at: str = ""
    head: str = ""
    head_dist: str = ""
    pool: Literal["none", "token", "patches", "avg", "avg_all"] = "none"
    ln_pool: str = ""
    call: Callable[[Any, Tensor], Tensor] = main_output
    ignored: dict[str, str] = field(default_factory=dict[str, str], hash=False)
