"""open_clip's own towers: facts, weight rows and hook rows of the vision transformer and the text transformer."""

from __future__ import annotations

import torch

from prisma_clip.canonical.blocks import block, blocks_hooks, blocks_rows, mha, mha_hooks
from prisma_clip.canonical.common import READ, linear, matrix_rows, norm, norm_hooks, patches
from prisma_core.plugin import (
    HookMap,
    ModelSpec,
    NormSpec,
    PoolSpec,
    Reader,
    TextPoolSpec,
    TextSpec,
    TokenLayout,
    WeightMap,
    linear_rows,
    norm_rows,
)

IGNORED = {
    "*.grad_checkpointing": "saves memory in training; the numbers are the same",
    "Transformer.width": "the width of its blocks",
    "Transformer.layers": "how many blocks there are",
    "MultiheadAttention.dropout": "does nothing in evaluation",
    "MultiheadAttention.embed_dim": "the shape of the weights",
    "MultiheadAttention.[kv]dim": "the shape of the weights",
    "MultiheadAttention.*_proj_*": "the shape of the weights",
    "Attention.logit_scale_max": "read where there is a logit scale, which is refused",
    "LayerScale.inplace": "the numbers are the same",
    "PatchDropout.*": "does nothing in evaluation",
    "VisionTransformer.output_tokens": "whether all tokens are returned beside the features",
    "VisionTransformer.output_dim": "read from the projection",
    "VisionTransformer.patch_size": "read from the patch projection",
    "VisionTransformer.final_ln_after_pool": "read where there is no attention pooling",
    "VisionTransformer.attn_pool_type": "which of two poolings; two are refused",
    "VisionTransformer.patch_dropout": "does nothing in evaluation",
    "VisionTransformer.preprocess_cfg": "how images are prepared",
    "*.image_mean": "how images are prepared",
    "*.image_std": "how images are prepared",
    "TextTransformer.output_tokens": "whether all tokens are returned beside the features",
    "TextTransformer.output_dim": "read from the projection",
    "TextTransformer.num_pos": "rows of the position embedding",
    "TextTransformer.width": "read from the token embedding",
    "TextTransformer.heads": "read from the blocks",
    "TextTransformer.pad_id": "read where padding is hidden",
    "TextTransformer.eos_id": "read where it is pooled at",
    "TextTransformer.use_pad_mask": "read where there is no class token, which needs a mask anyway",
    "TextTransformer.correct_cls_mask": "read where there is a class token",
    "Embedding.padding_idx": "which row is not trained",
    "Embedding.max_norm": "the core refuses a model that sets it, whose passes change the weights",
    "Embedding.norm_type": "of max_norm, which the core refuses where it is set",
    "LayerNorm*.normalized_shape": "the shape of the weights",
    "LayerNorm*.elementwise_affine": "missing weights are ones, missing biases zeros",
}


# -------------------------------------------------------------------- vision


def vision(upstream: Reader) -> ModelSpec:
    """Return the facts of open_clip's VisionTransformer."""
    rows, columns = upstream.grid_size
    blocks = tuple(block(one) for one in upstream.transformer.resblocks)
    d_model = upstream.conv1.out_channels
    pooling, ln_final, ln_pool, d_pool = _vision_pool(upstream, d_model)
    return ModelSpec(
        d_model=d_model,
        image_size=upstream.image_size,
        embed=patches(upstream.conv1),
        layout=TokenLayout(cls=1, rows=rows, columns=columns),
        blocks=blocks,
        ln_pre=norm(upstream.ln_pre),
        ln_final=ln_final,
        pool=pooling,
        ln_pool=ln_pool,
        d_pool=d_pool,
        n_classes=upstream.proj.shape[1] if upstream.has("proj") else None,
    )


def _vision_pool(upstream: Reader, d_model: int) -> tuple[PoolSpec, NormSpec | None, NormSpec | None, int]:
    kind = {"tok": "token", "avg": "avg", "none": "none"}[upstream.pool_type]
    post = norm(upstream.ln_post)
    if not upstream.has("attn_pool"):
        after = upstream.final_ln_after_pool
        return PoolSpec(kind=kind), None if after else post, post if after else None, d_model
    if upstream.has("attn_pool_contrastive"):
        raise upstream.unsupported("two attention poolings, one for captions and one for the features")
    if kind != "token":
        raise upstream.unsupported(f"{upstream.pool_type!r} of what attention pooling returns")
    # Whatever final_ln_after_pool says: the norm follows the attention, and norms each latent by itself.
    pooler = upstream.attn_pool
    if not pooler.is_a("open_clip.transformer.AttentionalPooler"):
        raise pooler.unsupported("its kind of pooling")
    latents, d_latent = pooler.query.shape
    pooling = PoolSpec(
        kind="attention",
        with_prefix=True,
        attn=mha(pooler.attn),
        n_latents=latents,
        d_latent=d_latent,
        latent_norm=norm(pooler.ln_q),
    )
    return pooling, norm(pooler.ln_k), post, d_latent


def vision_weights(upstream: Reader, spec: ModelSpec) -> WeightMap:
    """Return the weight map of open_clip's VisionTransformer."""
    post = "ln_final" if spec.ln_final is not None and spec.pool.kind != "attention" else "ln_pool"
    rows = (
        """
        class_embedding       ->  embed.prefix       :  d -> 1 d
        positional_embedding  ->  embed.pos_embed
        """
        + linear_rows("conv1", "embed.proj")
        + norm_rows("ln_pre", "ln_pre")
        + norm_rows("ln_post", post)
        + matrix_rows("proj", "head")
        + blocks_rows(upstream.transformer)
    )
    if spec.pool.kind == "attention":
        rows += (
            "attn_pool.query  ->  pool.attn.latent\n"
            + norm_rows("attn_pool.ln_q", "pool.attn.ln_latent")
            + norm_rows("attn_pool.ln_k", "ln_final")
            + linear_rows("attn_pool.attn.out_proj", "pool.attn.out")
            + "attn_pool.attn.in_proj_bias  ->  [pool.attn.q.bias, pool.attn.kv.bias]\n"
        )
        if upstream.attn_pool.attn.has("in_proj_weight"):
            rows += "attn_pool.attn.in_proj_weight  ->  [pool.attn.q.weight, pool.attn.kv.weight]\n"
        else:
            rows += """
                attn_pool.attn.q_proj_weight  ->  pool.attn.q.weight
                [attn_pool.attn.k_proj_weight, attn_pool.attn.v_proj_weight]  ->  pool.attn.kv.weight
            """
    return WeightMap.parse(rows)


def vision_hooks(upstream: Reader, spec: ModelSpec) -> HookMap:
    """Return the hook map of open_clip's VisionTransformer."""
    rows = """
        conv1          ->  hook_embed  : b m r c -> b (r c) m
        ln_pre : in    ->  hook_full_embed
                       ->  hook_logits
    """
    rows += norm_hooks("ln_pre", "ln_pre", "hook_ln_pre") + blocks_hooks(upstream.transformer)
    pool = spec.pool
    if pool.attn is not None:
        rows += (
            norm_hooks("attn_pool.ln_k", "ln_final", "hook_ln_final")
            + mha_hooks("attn_pool.attn", "pool.attn", width="e")
            + """
            attn_pool             ->  pool.hook_attn_out
            @ matmul : in         ->  ln_pool.hook_normalized
            """
        )
        return HookMap.parse(rows, d=spec.blocks[0].attn.d_head, e=pool.attn.d_head)
    if spec.ln_pool is None:
        rows += norm_hooks("ln_post", "ln_final", "hook_ln_final") + "@ matmul : in  ->  hook_pooled\n"
    else:
        rows += norm_hooks("ln_post", "ln_pool") + "ln_post : in  ->  hook_pooled\n"
    return HookMap.parse(rows, d=spec.blocks[0].attn.d_head)


# -------------------------------------------------------------------- text


def text(upstream: Reader, *, pool: str, eos_id: int | None) -> TextSpec:
    """Return the facts of open_clip's TextTransformer, or of CLIP's, whose text parts lie in the model itself.

    Args:
        upstream: what holds the parts.
        pool: the position that is read.
        eos_id: the end of text.
    """
    tokens, suffix = READ.embedding(upstream.token_embedding), upstream.get("cls_emb") is not None
    hides_padding = suffix or upstream.get("use_pad_mask", False)
    final = norm(upstream.ln_final)
    projection = upstream.text_projection if upstream.has("text_projection") else None
    width = None if projection is None else _width(projection)
    return TextSpec(
        d_model=tokens.embedding_dim,
        n_vocab=tokens.num_embeddings,
        n_ctx=upstream.positional_embedding.shape[0] - int(suffix),
        causal=_causal(upstream),
        suffix=suffix,
        pad_id=upstream.pad_id if hides_padding else None,
        pad_lag=int(suffix and not upstream.correct_cls_mask),
        blocks=tuple(block(one) for one in upstream.transformer.resblocks),
        ln_final=None if suffix else final,
        # A class token behind the text is what is read, whatever the pooling says.
        pool=TextPoolSpec(kind="last") if suffix else TextPoolSpec(kind=pool, eos_id=eos_id if pool == "eos" else None),
        ln_pool=final if suffix else None,
        n_classes=width,
    )


def _width(projection: object) -> int:
    if isinstance(projection, Reader):
        return linear(projection).out_features
    return projection.shape[1]  # pyright: ignore[reportAttributeAccessIssue]


def _causal(upstream: Reader) -> bool:
    if not upstream.has("attn_mask"):
        return False
    mask = upstream.attn_mask
    if not mask.is_meta and not torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1)):
        raise upstream.unsupported("a mask that is not causal")
    return True


def text_weights(upstream: Reader, spec: TextSpec) -> WeightMap:
    """Return the weight map of the text parts."""
    rows = """
        token_embedding.weight  ->  embed.W_E
        positional_embedding    ->  embed.pos_embed
        cls_emb                 ->  embed.suffix
        ignore attn_mask        :   a constant; the facts say that a token does not look ahead
    """
    rows += norm_rows("ln_final", "ln_pool" if spec.suffix else "ln_final") + blocks_rows(upstream.transformer)
    if upstream.has("text_projection"):
        as_matrix = not isinstance(upstream.text_projection, Reader)
        rows += (matrix_rows if as_matrix else linear_rows)("text_projection", "head")
    return WeightMap.parse(rows)


def text_hooks(upstream: Reader, spec: TextSpec) -> HookMap:
    """Return the hook map of the text parts, but for the output."""
    rows = """
        token_embedding   ->  hook_embed
        transformer : in  ->  hook_full_embed
    """
    rows += blocks_hooks(upstream.transformer)
    if spec.suffix:
        rows += norm_hooks("ln_final", "ln_pool") + "ln_final : in  ->  hook_pooled\n"
    else:
        rows += norm_hooks("ln_final", "ln_final", "hook_ln_final")
    if upstream.has("text_projection") and not spec.suffix:
        place = "text_projection : in" if isinstance(upstream.text_projection, Reader) else "@ matmul : in"
        rows += f"{place}  ->  hook_pooled\n"
    return HookMap.parse(rows, d=spec.blocks[0].attn.d_head)
