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
        attn_out, mlp_out: the places of what is added to the stream, where those are not the outputs of ``out`` and
            ``fc2``.
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
    attn_out: str = ""
    mlp_out: str = ""


@dataclass(frozen=True)
class TowerNames:
    """Where an encoder keeps its parts, as paths from it; empty where it has none.

    Attributes:
        blocks: the list of blocks.
        proj: the patch projection.
        image: the attribute that holds the size of image.
        prefix: tokens before the patches, each kind with its parameter.
        pos: the position embedding, of all tokens.
        side: the attribute that upstream divides the sides of an image of another size by; a number, or it cannot.
        resize: whether upstream's positions follow other sizes of image: ``asked``, if the caller says so; ``always``; or
            ``never``.
        resize_float32: in float32, whatever they are.
        ignored: tensors that its main output does not depend on, each with the reason.
    """

    block: BlockNames
    blocks: str = "layers"
    proj: str = "embeddings.patch_embeddings.projection"
    image: str = "embeddings.patch_embeddings.image_size"
    prefix: tuple[tuple[Prefix, str], ...] = (("cls", "embeddings.cls_token"),)
    pos: str = "embeddings.position_embeddings"
    ln_pre: str = ""
    ln_final: str = "layernorm"
    side: str = "embeddings.patch_size"
    resize: Literal["asked", "always", "never"] = "asked"
    resize_float32: bool = False
    ignored: dict[str, str] = field(default_factory=dict[str, str], hash=False)


@dataclass(frozen=True)
class ModelNames:
    """A class of transformers: its encoder, and what comes after it.

    Attributes:
        at: the path of the encoder.
        head, head_dist: linear layers that return the logits; two: the mean of both.
        pool: what the head reads.
        ln_pool: the norm of what it reads.
    """

    tower: TowerNames
    at: str = ""
    head: str = ""
    head_dist: str = ""
    pool: Literal["none", "token", "avg", "avg_all"] = "none"
    ln_pool: str = ""
    ignored: dict[str, str] = field(default_factory=dict[str, str], hash=False)
