"""timm's AttentionPoolLatent: attention pooling from learned queries."""

from __future__ import annotations

from prisma_core.plugin import PoolSpec, Reader, linear_rows, norm_rows
from prisma_timm.canonical.common import heads, mlp, mlp_hooks, mlp_rows, norm


def pool(module: Reader, *, with_prefix: bool) -> PoolSpec:
    """Return the facts of timm's AttentionPoolLatent."""
    if not module.is_a("timm.layers.attention_pool.AttentionPoolLatent"):
        raise module.unsupported("its kind of pooling")
    if module.has("pos_embed"):
        raise module.unsupported("positions added before pooling")
    if not module.q.is_a("Linear") or not module.has("mlp"):
        raise module.unsupported("attention pooling without a query projection or an MLP")
    if module.pool not in ("token", "avg"):
        raise module.unsupported(f"pool={module.pool!r} of several latents")
    return PoolSpec(
        kind="attention",
        with_prefix=with_prefix,
        attn=heads(module),
        n_latents=module.latent_len,
        latents="first" if module.pool == "token" else "mean",
        mlp=mlp(module.mlp),
        norm=norm(module.norm),
    )


def pool_rows(module: Reader, source: str) -> str:
    """Return the weight rows of attention pooling."""
    return (
        f"{source}.latent  ->  pool.attn.latent  :  1 n d -> n d"
        + linear_rows(f"{source}.q", "pool.attn.q")
        + linear_rows(f"{source}.kv", "pool.attn.kv")
        + norm_rows(f"{source}.q_norm", "pool.attn.q_norm")
        + norm_rows(f"{source}.k_norm", "pool.attn.k_norm")
        + linear_rows(f"{source}.proj", "pool.attn.out")
        + norm_rows(f"{source}.norm", "pool.ln")
        + mlp_rows(module.mlp, f"{source}.mlp", "pool.mlp")
    )


def pool_hooks(module: Reader, source: str) -> str:
    """Return the hook rows of attention pooling; ``n`` is its number of heads."""
    return f"""
        {source}.q_norm                                   ->  pool.attn.hook_q            : b n p d -> b p n d
        {source}.k_norm                                   ->  pool.attn.hook_k            : b n p d -> b p n d
        {source} @ matmul#1 : in1                         ->  pool.attn.hook_v            : b n p d -> b p n d
        {source} @ softmax : in                           ->  pool.attn.hook_attn_scores
        {source} @ softmax                                ->  pool.attn.hook_pattern
        {source}.proj : in                                ->  pool.attn.hook_z            : b p (n d) -> b p n d
        {source}.proj_drop                                ->  pool.hook_attn_out
        {source}.norm                                     ->  pool.ln.hook_normalized
        {source}.mlp                                      ->  pool.hook_mlp_out
    """ + mlp_hooks(module.mlp, f"{source}.mlp", "pool.mlp")
