"""Parts of transformers' CLIP-like towers: blocks of split queries, keys and values, and their unfused attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from prisma_clip.canonical.common import READ, linear, norm
from prisma_core.plugin import (
    Adapter,
    AttentionSpec,
    BlockSpec,
    MlpNames,
    Reader,
    TextPoolSpec,
    TextSpec,
    eager_attention,
    linear_rows,
    masks_as_built,
    multihead_attention,
    norm_rows,
    same_for_all,
    switched,
)

MLP = MlpNames(act="activation_fn")

IGNORED = {
    "*.config": "facts are read from the modules that it built",
    "*.kernel_config": "which kernels run",
    "*.loss_type": "of training",
    "*.all_tied_weights_keys": "how weights are saved",
    "GELUTanh.act": "one of two ways to compute the same",
    "GELUActivation.act": "one of two ways to compute the same",
    "*.generation_config": "how texts are written",
    "*.warnings_issued": "which warnings were shown",
    "*.gradient_checkpointing": "saves memory in training; the numbers are the same",
    "*.embed_dim": "the width of the weights",
    "*.dropout": "does nothing in evaluation",
    "*.attention_dropout": "does nothing in evaluation",
    "*.num_positions": "rows of the position embedding",
    "*.patch_size": "read from the patch projection",
    "*.chunk_size_feed_forward": "saves memory; the numbers are the same",
    "*.seq_len_dim": "saves memory; the numbers are the same",
    "*.all_head_size": "the shape of the weights",
    "*.pooler": "makes a second output of the first token, which is left out",
    "*Pooler.activation": "of an output that is left out",
    "*.use_head": "whether there is a head",
    "*.projection_dim": "the shape of the projections",
    "*.text_embed_dim": "the shape of the projections",
    "*.vision_embed_dim": "the shape of the projections",
    "*.name_or_path": "where it was loaded from",
    "Embedding.padding_idx": "which row is not trained",
    "Embedding.max_norm": "the core refuses a model that sets it, whose passes change the weights",
    "Embedding.norm_type": "of max_norm, which the core refuses where it is set",
    "MultiheadAttention.dropout": "does nothing in evaluation",
    "MultiheadAttention.embed_dim": "the shape of the weights",
    "MultiheadAttention.[kv]dim": "the shape of the weights",
    "Siglip2MultiheadAttentionPoolingHead.num_heads": "read from its attention",
}


def block(module: Reader, *, causal: bool) -> BlockSpec:
    """Return the facts of a block whose parts are named as CLIP's."""
    attn = module.self_attn
    masks_as_built(attn, causal=causal)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        linear(getattr(attn, name))
    return BlockSpec(
        attn=AttentionSpec(n_heads=attn.num_heads, n_kv_heads=attn.num_heads, d_head=attn.head_dim, scale=attn.scale),
        mlp=READ.mlp(module.mlp, MLP),
        ln1=norm(module.layer_norm1),
        ln2=norm(module.layer_norm2),
    )


def blocks_rows(encoder: Reader) -> str:
    """Return the weight rows of all blocks."""
    at, ours = "encoder.layers.{l}", "blocks.{l}"
    first = encoder.layers[0]
    rows = READ.qkv_rows(first.self_attn, f"{at}.self_attn", f"{ours}.attn.qkv")
    rows += linear_rows(f"{at}.self_attn.out_proj", f"{ours}.attn.out")
    rows += READ.mlp_rows(first.mlp, f"{at}.mlp", f"{ours}.mlp", MLP)
    return rows + norm_rows(f"{at}.layer_norm1", f"{ours}.ln1") + norm_rows(f"{at}.layer_norm2", f"{ours}.ln2")


BLOCKS_HOOKS = """
    encoder.layers.{l}.layer_norm1 : in          ->  blocks.{l}.hook_resid_pre
    encoder.layers.{l}.layer_norm1               ->  blocks.{l}.ln1.hook_normalized
    encoder.layers.{l}.self_attn.q_proj          ->  blocks.{l}.attn.hook_q  : b p (h d) -> b p h d
    encoder.layers.{l}.self_attn.k_proj          ->  blocks.{l}.attn.hook_k  : b p (h d) -> b p h d
    encoder.layers.{l}.self_attn.v_proj          ->  blocks.{l}.attn.hook_v  : b p (h d) -> b p h d
    encoder.layers.{l}.self_attn @ softmax : in  ->  blocks.{l}.attn.hook_attn_scores
    encoder.layers.{l}.self_attn @ softmax       ->  blocks.{l}.attn.hook_pattern
    encoder.layers.{l}.self_attn.out_proj : in   ->  blocks.{l}.attn.hook_z  : b p (h d) -> b p h d
    encoder.layers.{l}.self_attn                 ->  blocks.{l}.hook_attn_out
    encoder.layers.{l}.layer_norm2 : in          ->  blocks.{l}.hook_resid_mid
    encoder.layers.{l}.layer_norm2               ->  blocks.{l}.ln2.hook_normalized
    encoder.layers.{l}.mlp.fc1                   ->  blocks.{l}.mlp.hook_pre
    encoder.layers.{l}.mlp.fc2 : in              ->  blocks.{l}.mlp.hook_post
    encoder.layers.{l}.mlp                       ->  blocks.{l}.hook_mlp_out
    encoder.layers.{l}                           ->  blocks.{l}.hook_resid_post
"""


def blocks(encoder: Reader, *, causal: bool) -> tuple[BlockSpec, ...]:
    """Return the facts of an encoder's blocks."""
    specs = tuple(block(layer, causal=causal) for layer in encoder.layers)
    same_for_all(encoder, [type(layer.module).__qualname__ for layer in encoder.layers])
    return specs


# -------------------------------------------------------------------- calling, and looking inside


def pixels(tower: Any, image: Tensor) -> dict[str, Any]:
    """Return the arguments that a vision tower, or a model that has it, takes for an image."""
    embed = tower.embeddings
    if not isinstance(embed.patch_embedding, nn.Linear):
        native = (embed.image_size, embed.image_size)
        return {"pixel_values": image, "interpolate_pos_encoding": tuple(image.shape[2:]) != native}
    patch = embed.patch_size  # SigLIP 2 is handed patches, each in one
    rows, columns = image.shape[2] // patch, image.shape[3] // patch
    flat = rearrange(image, "b c (r p) (s q) -> b (r s) (p q c)", p=patch, q=patch)
    shapes = torch.tensor([[rows, columns]] * len(image), device=image.device)
    mask = torch.ones(flat.shape[:2], dtype=torch.long, device=image.device)
    return {"pixel_values": flat, "spatial_shapes": shapes, "pixel_attention_mask": mask}


def texts(spec: TextSpec, tokens: Tensor) -> dict[str, Any]:
    """Return the arguments that a text tower, or a model that has it, takes for tokens; padding is masked if it is."""
    if spec.pad_id is None:
        return {"input_ids": tokens}
    return {"input_ids": tokens, "attention_mask": (tokens != spec.pad_id).long()}


@contextmanager
def eager(upstream: nn.Module) -> Iterator[None]:
    """Make transformers' attentions, and torch's own among them, compute step by step for the time of the scope.

    MLPs take all tokens at once there: those told to save memory take some after others, and each would show its last.
    """
    whole = switched(upstream.modules(), "chunk_size_feed_forward", 0)
    with eager_attention(upstream), multihead_attention(upstream), whole:
        yield


# -------------------------------------------------------------------- adapters


def models(*names: str) -> tuple[str, ...]:
    """Return the qualified names of classes among transformers' models."""
    return tuple(f"transformers.models.{name}" for name in names)


class Tower(Adapter):
    """Base of all towers: transformers' attention, unfused.

    Attributes:
        pooled: what a projection behind the tower reads, where the tower alone returns all tokens.
    """

    ignored: ClassVar[Mapping[str, str]] = IGNORED
    pooled: ClassVar[TextPoolSpec | None] = None

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        spec = self.spec(Reader(upstream))
        result = upstream(**(texts(spec, *inputs) if isinstance(spec, TextSpec) else pixels(upstream, *inputs)))
        return result.last_hidden_state if spec.pool.kind == "none" else result.pooler_output

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager(upstream)
