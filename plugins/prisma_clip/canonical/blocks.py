"""open_clip's blocks: facts, weight rows and hook rows."""

from __future__ import annotations

from prisma_clip.canonical.common import READ, linear, norm
from prisma_core.plugin import AttentionSpec, BlockSpec, MlpNames, Reader, linear_rows, norm_rows, same_for_all

BLOCK = "open_clip.transformer.ResidualAttentionBlock"
CUSTOM_BLOCK = "open_clip.transformer.CustomResidualAttentionBlock"
ATTENTION = "open_clip.transformer.Attention"
NARROW = "prisma_clip.tinyclip.NarrowAttention"
MLP = MlpNames("mlp.c_fc", "mlp.c_proj", "mlp.gelu")
CUSTOM_MLP = MLP._replace(ln="mlp.ln")


def mha(module: Reader) -> AttentionSpec:
    """Return the facts of torch's multi-head attention, or of TinyCLIP's with fewer heads."""
    if module.is_a(NARROW):
        linear(module.out_proj)
        heads, width = module.num_heads, module.head_dim
        return AttentionSpec(n_heads=heads, n_kv_heads=heads, d_head=width, scale=width**-0.5)
    if not READ.multihead(module).batch_first:
        raise module.unsupported("tokens before the batch")
    return AttentionSpec(
        n_heads=module.num_heads,
        n_kv_heads=module.num_heads,
        d_head=module.head_dim,
        scale=module.head_dim**-0.5,
    )


def _custom_attention(module: Reader) -> AttentionSpec:
    if not module.is_a(ATTENTION):
        raise module.unsupported("its kind of attention")
    if module.has("logit_scale") or module.scaled_cosine:
        raise module.unsupported("attention by cosine, with a learned scale")
    if module.has("head_scale") or module.scale_heads:
        raise module.unsupported("a learned scale for each head")
    linear(module.out_proj)
    fused, scale = module.use_fsdpa, module.scale  # which the fused kernel does not get
    return AttentionSpec(
        n_heads=module.num_heads,
        n_kv_heads=module.num_heads,
        d_head=module.head_dim,
        scale=module.head_dim**-0.5 if fused else scale,
        qk_norm=READ.qk_norm(module.ln_q, module.ln_k),
        inner_norm=norm(module.ln_inner),
    )


def block(module: Reader) -> BlockSpec:
    """Return the facts of a block."""
    custom = module.is_a(CUSTOM_BLOCK)
    if not custom and (not module.is_a(BLOCK) or module.has("ln_1_kv")):
        raise module.unsupported("its kind of block")
    if custom and norm(module.ln_attn) is not None:
        raise module.unsupported("sandwich norms, before and after attention")
    return BlockSpec(
        attn=_custom_attention(module.attn) if custom else mha(module.attn),
        mlp=READ.mlp(module, CUSTOM_MLP if custom else MLP),
        ln1=norm(module.ln_1),
        ln2=norm(module.ln_2),
        attn_scale=READ.scaled(module.ls_1),
        mlp_scale=READ.scaled(module.ls_2),
    )


def block_rows(module: Reader, source: str, target: str) -> str:
    """Return the weight rows of a block."""
    rows = f"""
        {source}.attn.in_proj_weight        ->  {target}.attn.qkv.weight
        {source}.attn.in_proj_bias | zeros  ->  {target}.attn.qkv.bias
        {source}.ls_1.gamma                 ->  {target}.ls1.gamma
        {source}.ls_2.gamma                 ->  {target}.ls2.gamma
    """
    for theirs, ours in (("ln_1", "ln1"), ("ln_2", "ln2")):
        rows += norm_rows(f"{source}.{theirs}", f"{target}.{ours}")
    rows += linear_rows(f"{source}.attn.out_proj", f"{target}.attn.out")
    rows += READ.mlp_rows(module, source, f"{target}.mlp", CUSTOM_MLP if module.is_a(CUSTOM_BLOCK) else MLP)
    if module.is_a(CUSTOM_BLOCK):
        norms = (("attn.ln_q", "attn.q_norm"), ("attn.ln_k", "attn.k_norm"), ("attn.ln_inner", "attn.ln"))
        for theirs, ours in norms:
            rows += norm_rows(f"{source}.{theirs}", f"{target}.{ours}")
    return rows


def block_hooks(module: Reader, source: str, target: str) -> str:
    """Return the hook rows of a block; ``d`` is the width of a head."""
    rows = f"""
        {source}.ln_1 : in        ->  {target}.hook_resid_pre
        {source}.ln_1             ->  {target}.ln1.hook_normalized
        {source}.ls_1             ->  {target}.hook_attn_out
        {source}.ln_2 : in        ->  {target}.hook_resid_mid
        {source}.ln_2             ->  {target}.ln2.hook_normalized
        {source}.ls_2             ->  {target}.hook_mlp_out
        {source}                  ->  {target}.hook_resid_post
    """
    rows += READ.mlp_hooks(module, source, f"{target}.mlp", CUSTOM_MLP if module.is_a(CUSTOM_BLOCK) else MLP)
    if not module.is_a(CUSTOM_BLOCK):
        return rows + mha_hooks(f"{source}.attn", f"{target}.attn")
    return (
        rows
        + f"""
        {source}.attn.ln_q                                 ->  {target}.attn.hook_q  : b h p d -> b p h d
        {source}.attn.ln_k                                 ->  {target}.attn.hook_k  : b h p d -> b p h d
        {source}.attn @ scaled_dot_product_attention : in2  ->  {target}.attn.hook_v  : b h p d -> b p h d
        {source}.attn.ln_q             ->  {target}.attn.q_norm.hook_normalized  : b h p d -> b p h d
        {source}.attn.ln_k             ->  {target}.attn.k_norm.hook_normalized  : b h p d -> b p h d
        {source}.attn.ln_inner : in    ->  {target}.attn.hook_z  : b p (h d) -> b p h d
        {source}.attn.ln_inner         ->  {target}.attn.ln.hook_normalized
    """
    )


def mha_hooks(source: str, target: str, width: str = "d") -> str:
    """Return the hook rows of torch's multi-head attention, taken step by step; ``width`` names that of a head."""
    split = f"b p (h {width}) -> b p h {width}"
    return f"""
        {source} @ linear        ->  {target}.hook_q            : {split}
        {source} @ linear#1      ->  {target}.hook_k            : {split}
        {source} @ linear#2      ->  {target}.hook_v            : {split}
        {source} @ softmax : in  ->  {target}.hook_attn_scores
        {source} @ softmax       ->  {target}.hook_pattern
        {source} @ linear#3 : in  ->  {target}.hook_z           : {split}
    """


def blocks_rows(transformer: Reader) -> str:
    """Return the weight rows of all blocks."""
    tables = [block_rows(one, "transformer.resblocks.{l}", "blocks.{l}") for one in transformer.resblocks]
    return same_for_all(transformer, tables)


def blocks_hooks(transformer: Reader) -> str:
    """Return the hook rows of all blocks; ``d`` is the width of a head."""
    if not transformer.batch_first:
        raise transformer.unsupported("tokens before the batch")
    tables = [block_hooks(one, "transformer.resblocks.{l}", "blocks.{l}") for one in transformer.resblocks]
    return same_for_all(transformer, tables)
