"""timm's attention and blocks: facts, weight rows and hook rows of each kind."""

from __future__ import annotations

from prisma_core.plugin import AttentionSpec, BlockSpec, MlpSpec, Reader, linear_rows, norm_rows
from prisma_timm.canonical.common import activation, heads, is_scaled, linear, mlp, mlp_hooks, mlp_rows, norm

PRE = "timm.models.vision_transformer.Block"
RES_POST = "timm.models.vision_transformer.ResPostBlock"
PARALLEL = "timm.models.vision_transformer.ParallelScalingBlock"
SIDE_BY_SIDE = "timm.models.vision_transformer.ParallelThingsBlock"

IGNORED = {
    "Attention.attn_dim": "num_heads times head_dim",
    "ParallelScalingBlock.in_split": "the widths of the MLP and of attention",
}


def attention(module: Reader) -> AttentionSpec:
    """Return the facts of timm's Attention."""
    if module.is_a("timm.layers.diff_attention.DiffAttention"):
        raise module.unsupported("differential attention")
    if not module.is_a("timm.layers.attention.Attention"):
        raise module.unsupported("its kind of attention")
    if module.has("gate"):
        raise module.unsupported("a gate on the output of attention")
    return heads(module, inner_norm=norm(module.norm))


def attention_rows(source: str, target: str) -> str:
    """Return the weight rows of what ``attention`` reads."""
    return (
        linear_rows(f"{source}.qkv", f"{target}.qkv")
        + norm_rows(f"{source}.q_norm", f"{target}.q_norm")
        + norm_rows(f"{source}.k_norm", f"{target}.k_norm")
        + norm_rows(f"{source}.norm", f"{target}.ln")
        + linear_rows(f"{source}.proj", f"{target}.out")
    )


def pattern_hooks(source: str, target: str, *, z: str) -> str:
    """Return the hook rows of scores, patterns and what they make of values, which the module ``z`` reads."""
    return f"""
        {source} @ softmax : in  ->  {target}.hook_attn_scores
        {source}.attn_drop       ->  {target}.hook_pattern
        {source}.{z} : in        ->  {target}.hook_z  : b p (h d) -> b p h d
    """


def attention_hooks(source: str, target: str, *, z: str = "norm") -> str:
    """Return the hook rows of an attention with normed queries and keys (see ``pattern_hooks``)."""
    return f"""
        {source}.q_norm          ->  {target}.hook_q                  : b h p d -> b p h d
        {source}.k_norm          ->  {target}.hook_k                  : b h p d -> b p h d
        {source}.q_norm          ->  {target}.q_norm.hook_normalized  : b h p d -> b p h d
        {source}.k_norm          ->  {target}.k_norm.hook_normalized  : b h p d -> b p h d
        {source} @ matmul#1 : in1  ->  {target}.hook_v                : b h p d -> b p h d
        {source}.norm            ->  {target}.ln.hook_normalized
    """ + pattern_hooks(source, target, z=z)


def stream_hooks(source: str, target: str, *, middle: str = "norm2") -> str:
    """Return the hook rows of a block's stream, which the module ``middle`` reads between attention and MLP."""
    return f"""
        {source} : in           ->  {target}.hook_resid_pre
        {source}.norm1          ->  {target}.ln1.hook_normalized
        {source}.drop_path1     ->  {target}.hook_attn_out
        {source}.{middle} : in  ->  {target}.hook_resid_mid
        {source}.norm2          ->  {target}.ln2.hook_normalized
        {source}.drop_path2     ->  {target}.hook_mlp_out
        {source}                ->  {target}.hook_resid_post
    """


def block(module: Reader) -> BlockSpec:
    """Return the facts of a block."""
    if module.is_a(PRE, RES_POST):
        post = module.is_a(RES_POST)
        return BlockSpec(
            kind="res_post" if post else "pre",
            attn=attention(module.attn),
            mlp=mlp(module.mlp),
            ln1=norm(module.norm1),
            ln2=norm(module.norm2),
            attn_scale=not post and is_scaled(module.ls1),
            mlp_scale=not post and is_scaled(module.ls2),
        )
    if module.is_a(PARALLEL):
        return _parallel(module)
    if module.is_a(SIDE_BY_SIDE):
        return _side_by_side(module)
    if module.is_a("timm.models.vision_transformer.DiffParallelScalingBlock"):
        raise module.unsupported("differential attention")
    raise module.unsupported("its kind of block")


def _parallel(module: Reader) -> BlockSpec:
    if module.has("out_proj"):
        raise module.unsupported("one output projection for attention and MLP")
    scaled = is_scaled(module.ls)
    return BlockSpec(
        kind="parallel",
        attn=heads(module),
        mlp=MlpSpec(d_mlp=linear(module.mlp_out_proj).in_features, act=activation(module.mlp_act)),
        ln1=norm(module.in_norm),
        ln2=None,
        attn_scale=scaled,
        mlp_scale=scaled,
    )


def _side_by_side(module: Reader) -> BlockSpec:
    attns, mlps = list(module.attns), list(module.ffns)
    first, last = attns[0], mlps[0]
    spec = BlockSpec(
        n_parallel=module.num_parallel,
        attn=attention(first.attn),
        mlp=mlp(last.mlp),
        ln1=norm(first.norm),
        ln2=norm(last.norm),
        attn_scale=is_scaled(first.ls),
        mlp_scale=is_scaled(last.ls),
    )
    same = all(
        (attention(part.attn), norm(part.norm), is_scaled(part.ls)) == (spec.attn, spec.ln1, spec.attn_scale)
        for part in attns
    ) and all(
        (mlp(part.mlp), norm(part.norm), is_scaled(part.ls)) == (spec.mlp, spec.ln2, spec.mlp_scale) for part in mlps
    )
    if not same or {len(attns), len(mlps)} != {spec.n_parallel}:
        raise module.unsupported("attentions or MLPs side by side that differ in kind or number")
    return spec


def block_rows(module: Reader) -> str:
    """Return the weight rows of all blocks like this one."""
    at = "blocks.{l}"
    if module.is_a(SIDE_BY_SIDE):
        attn, ffn = f"{at}.attns.{{i}}", f"{at}.ffns.{{i}}"
        return (
            norm_rows(f"{attn}.norm", f"{at}.ln1.{{i}}")
            + attention_rows(f"{attn}.attn", f"{at}.attn.{{i}}")
            + norm_rows(f"{ffn}.norm", f"{at}.ln2.{{i}}")
            + mlp_rows(module.ffns[0].mlp, f"{ffn}.mlp", f"{at}.mlp.{{i}}")
            + f"""
                {attn}.ls.gamma  ->  {at}.ls1.{{i}}.gamma
                {ffn}.ls.gamma   ->  {at}.ls2.{{i}}.gamma
            """
        )
    if module.is_a(PARALLEL):
        bias = f"{at}.in_proj.bias" if module.in_proj.has("bias") else f"[{at}.mlp_bias, zeros]"
        return (
            norm_rows(f"{at}.in_norm", f"{at}.ln1")
            + norm_rows(f"{at}.q_norm", f"{at}.attn.q_norm")
            + norm_rows(f"{at}.k_norm", f"{at}.attn.k_norm")
            + linear_rows(f"{at}.attn_out_proj", f"{at}.attn.out")
            + linear_rows(f"{at}.mlp_out_proj", f"{at}.mlp.fc_out")
            + f"""
                {at}.in_proj.weight  ->  [{at}.mlp.fc_in.weight, {at}.attn.qkv.weight]
                {bias}               ->  [{at}.mlp.fc_in.bias, {at}.attn.qkv.bias]
                {at}.ls.gamma        ->  {at}.ls1.gamma
                {at}.ls.gamma        ->  {at}.ls2.gamma
            """
        )
    return (
        norm_rows(f"{at}.norm1", f"{at}.ln1")
        + attention_rows(f"{at}.attn", f"{at}.attn")
        + norm_rows(f"{at}.norm2", f"{at}.ln2")
        + mlp_rows(module.mlp, f"{at}.mlp", f"{at}.mlp")
        + f"""
            {at}.ls1.gamma  ->  {at}.ls1.gamma
            {at}.ls2.gamma  ->  {at}.ls2.gamma
        """
    )


def block_hooks(module: Reader) -> str:
    """Return the hook rows of all blocks like this one."""
    at = "blocks.{l}"
    stream = f"""
        {at} : in  ->  {at}.hook_resid_pre
        {at}       ->  {at}.hook_resid_post
    """
    if module.is_a(SIDE_BY_SIDE):
        attn, ffn = f"{at}.attns.{{i}}", f"{at}.ffns.{{i}}"
        return (
            stream
            + attention_hooks(f"{attn}.attn", f"{at}.attn.{{i}}")
            + mlp_hooks(module.ffns[0].mlp, f"{ffn}.mlp", f"{at}.mlp.{{i}}")
            + f"""
                {attn}.norm         ->  {at}.ln1.{{i}}.hook_normalized
                {at} @ sum          ->  {at}.hook_attn_out
                {at}.ffns.0 : in    ->  {at}.hook_resid_mid
                {ffn}.norm          ->  {at}.ln2.{{i}}.hook_normalized
                {at} @ sum#1        ->  {at}.hook_mlp_out
            """
        )
    if module.is_a(PARALLEL):
        # With a layer scale upstream adds attention and MLP before scaling, so neither addend exists on its own.
        addends = f"""
            {at}.attn_out_proj  ->  {at}.hook_attn_out
            {at}.mlp_out_proj   ->  {at}.hook_mlp_out
        """
        return (
            stream
            + ("" if is_scaled(module.ls) else addends)
            + pattern_hooks(at, f"{at}.attn", z="attn_out_proj")
            + f"""
                {at}.in_norm             ->  {at}.ln1.hook_normalized
                {at}.q_norm              ->  {at}.attn.hook_q
                {at}.k_norm              ->  {at}.attn.hook_k
                {at}.q_norm              ->  {at}.attn.q_norm.hook_normalized
                {at}.k_norm              ->  {at}.attn.k_norm.hook_normalized
                {at} @ matmul#1 : in1    ->  {at}.attn.hook_v              : b h p d -> b p h d
                {at}.mlp_act : in        ->  {at}.mlp.hook_pre
                {at}.mlp_out_proj : in   ->  {at}.mlp.hook_post
            """
        )
    return (
        stream_hooks(at, at, middle="mlp" if module.is_a(RES_POST) else "norm2")
        + attention_hooks(f"{at}.attn", f"{at}.attn")
        + mlp_hooks(module.mlp, f"{at}.mlp", f"{at}.mlp")
    )
