"""Where each of transformers' classes keeps its parts. Facts are read off the parts; only their places stand here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Prefix = Literal["cls", "distillation", "registers"]


@dataclass(frozen=True)
class BlockNames:
    """Where a block keeps its parts, as paths from the block; empty where it has none.

    Attributes:
        attn: the module in whose forward the softmax is taken.
        heads, scale: attributes of ``attn``; without ``scale`` it is one over the root of a head's width.
        q, k, v: projections; or ``qkv``, one for all, its rows in that order.
        ls1, ls2: parameters of layer scale.
        act: the activation function.
        bias: the module whose table is added to the scores.
        q_norm, k_norm: norms of queries and keys.
        mlp: the MLP, which may be a gated one with projections ``gate_proj``, ``up_proj`` and ``down_proj`` instead.
        single: an attribute that counts experts, of which there must be one.
        absent: modules that must be identities.
        addend: the place of what attention adds to the stream, where that is not the output of ``out``.
        pos_first: what ``out`` reads has its axes in the order position, batch, channel.
        attn_out, mlp_out: the places of what is added to the stream where there is layer scale.
    """

    attn: str = "self_attn"
    heads: str = "num_heads"
    scale: str = "scale"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    out: str = "self_attn.out_proj"
    ln1: str = "layer_norm1"
    ln2: str = "layer_norm2"
    fc1: str = "mlp.fc1"
    gate: str = ""
    act: str = "mlp.activation_fn"
    fc2: str = "mlp.fc2"
    ls1: str = ""
    ls2: str = ""
    bias: str = ""
    q_norm: str = ""
    k_norm: str = ""
    mlp: str = "mlp"
    single: str = ""
    absent: tuple[str, ...] = ()
    addend: str = ""
    pos_first: bool = False
    attn_out: str = ""
    mlp_out: str = ""


@dataclass(frozen=True)
class TowerNames:
    """Where an encoder keeps its parts, as paths from it; empty where it has none.

    Attributes:
        blocks: the list of blocks.
        proj: the patch projection.
        stem: the module from pictures to patches, where it is more than that projection.
        image: the attribute that holds the size of image.
        prefix: tokens before the patches, each kind with its parameter.
        embed_norm: a norm of the patch embedding.
        pos: the position embedding, of all tokens.
        pos_without_registers: there are none for registers, which come in later.
        pos_and_first: the first position, which is no patch's, is added to those of all patches.
        looked_up: upstream computes which of its positions a patch takes.
        rope: the module that turns queries and keys, and ``rope_cls``, the angles of the class token.
        last: the place of the main output, where the final norm is called again later.
        side: the attribute that upstream divides the sides of an image of another size by: a number, or it cannot.
            Empty where it can divide by anything.
        resize: whether upstream's positions follow other sizes of image: ``asked``, if the caller says so;
            ``always``; or ``never``.
        mode, antialias: of that interpolation.
        resize_float32: in float32, whatever they are.
        bias: the module whose table is added to the scores of all blocks.
        ignored: tensors that its main output does not depend on, each with the reason.
    """

    block: BlockNames
    blocks: str = "layers"
    proj: str = "embeddings.patch_embeddings.projection"
    stem: str = ""
    image: str = "embeddings.patch_embeddings.image_size"
    prefix: tuple[tuple[Prefix, str], ...] = (("cls", "embeddings.cls_token"),)
    embed_norm: str = ""
    pos: str = "embeddings.position_embeddings"
    pos_without_registers: bool = False
    pos_and_first: bool = False
    looked_up: bool = False
    rope: str = ""
    rope_cls: str = ""
    last: str = ""
    ln_pre: str = ""
    ln_final: str = "layernorm"
    side: str = "embeddings.patch_size"
    resize: Literal["asked", "always", "never"] = "asked"
    mode: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = False
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
    """

    tower: TowerNames
    at: str = ""
    head: str = ""
    head_dist: str = ""
    pool: Literal["none", "token", "patches", "avg", "avg_all"] = "none"
    ln_pool: str = ""
    ignored: dict[str, str] = field(default_factory=dict[str, str], hash=False)
