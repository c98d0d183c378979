"""transformers' blocks: facts, weight rows and hook rows, given where each class keeps its parts."""

from __future__ import annotations

from prisma_core.adapter import Reader
from prisma_core.spec import AttentionSpec, BlockSpec, MlpSpec
from prisma_hf import parts
from prisma_hf.names import BlockNames


def block(module: Reader, names: BlockNames) -> BlockSpec:
    """Return the facts of a block."""
    return BlockSpec(
        attn=_attention(module, names),
        mlp=_mlp(module, names),
        ln1=parts.norm(parts.walk(module, names.ln1)),
        ln2=parts.norm(parts.walk(module, names.ln2)),
        attn_scale=_scaled(module, names.ls1),
        mlp_scale=_scaled(module, names.ls2),
    )


def _attention(module: Reader, names: BlockNames) -> AttentionSpec:
    attn = parts.walk(module, names.attn)
    heads = getattr(attn, names.heads)
    out = parts.linear(parts.walk(module, names.out))
    width = out.in_features // heads
    return AttentionSpec(
        n_heads=heads,
        n_kv_heads=heads,
        d_head=width,
        scale=float(getattr(attn, names.scale)) if names.scale else width**-0.5,
    )


def _mlp(module: Reader, names: BlockNames) -> MlpSpec:
    act = parts.walk(module, names.act)
    if not isinstance(act, Reader):
        raise module.unsupported("an activation function that is no module")
    return MlpSpec(
        d_mlp=parts.linear(parts.walk(module, names.fc1)).out_features,
        act=parts.activation(act),
        gated=bool(names.gate),
    )


def _scaled(module: Reader, path: str) -> bool:
    """Return whether there is a learned scale; upstream has the number one in its place where there is none."""
    if not path:
        return False
    scale = parts.walk(module, path)
    if scale is None or (isinstance(scale, float) and scale == 1.0):
        return False
    return True


def rows(layers: Reader, at: str, names: BlockNames) -> str:
    """Return the weight rows of all blocks."""
    first = next(iter(layers))
    theirs, ours = f"{at}.{{l}}", "blocks.{l}"
    if names.qkv:
        rows = parts.linear_rows(f"{theirs}.{names.qkv}", f"{ours}.attn.qkv")
    else:
        projections = (names.q, names.k, names.v)
        weights = ", ".join(f"{theirs}.{path}.weight" for path in projections)
        biased = [parts.linear(parts.walk(first, path)).has("bias") for path in projections]
        biases = [f"{theirs}.{path}.bias" if bias else None for path, bias in zip(projections, biased, strict=True)]
        rows = f"""
            [{weights}]                  ->  {ours}.attn.qkv.weight
            {parts.joined_bias(biases)}  ->  {ours}.attn.qkv.bias
        """
    for source, target in ((names.ln1, "ln1"), (names.ln2, "ln2")):
        rows += parts.norm_rows(f"{theirs}.{source}", f"{ours}.{target}")
    linears = (
        (names.out, "attn.out"),
        (names.fc1, "mlp.fc_in"),
        (names.gate, "mlp.fc_gate"),
        (names.fc2, "mlp.fc_out"),
    )
    for source, target in linears:
        rows += parts.linear_rows(f"{theirs}.{source}", f"{ours}.{target}") if source else ""
    for source, target in ((names.ls1, "ls1"), (names.ls2, "ls2")):
        rows += f"{theirs}.{source}  ->  {ours}.{target}.gamma\n" if source else ""
    return rows


def hooks(layers: Reader, at: str, names: BlockNames) -> str:
    """Return the hook rows of all blocks."""
    theirs, ours = f"{at}.{{l}}", "blocks.{l}"
    first = next(iter(layers))
    scaled = _scaled(first, names.ls1)
    attn_out = names.attn_out if scaled and names.attn_out else names.out
    mlp_out = names.mlp_out if scaled and names.mlp_out else names.fc2
    rows = f"""
        {theirs} : in                         ->  {ours}.hook_resid_pre
        {theirs}.{names.ln1}                  ->  {ours}.ln1.hook_normalized
        {theirs}.{names.attn} @ softmax : in  ->  {ours}.attn.hook_attn_scores
        {theirs}.{names.attn} @ softmax       ->  {ours}.attn.hook_pattern
        {theirs}.{names.out} : in             ->  {ours}.attn.hook_z        : b p (h d) -> b p h d
        {_place(theirs, attn_out)}            ->  {ours}.hook_attn_out
        {theirs}.{names.ln2} : in             ->  {ours}.hook_resid_mid
        {theirs}.{names.ln2}                  ->  {ours}.ln2.hook_normalized
        {theirs}.{names.fc2} : in             ->  {ours}.mlp.hook_post
        {_place(theirs, mlp_out)}             ->  {ours}.hook_mlp_out
        {theirs}                              ->  {ours}.hook_resid_post
    """
    if names.gate:
        rows += f"""
            {theirs}.{names.gate}  ->  {ours}.mlp.hook_pre
            {theirs}.{names.fc1}   ->  {ours}.mlp.hook_pre_linear
        """
    else:
        rows += f"{theirs}.{names.fc1}  ->  {ours}.mlp.hook_pre\n"
    if names.qkv:
        return (
            rows
            + f"""
            {theirs}.{names.attn} @ matmul : in     ->  {ours}.attn.hook_q  : b h p d -> b p h d
            {theirs}.{names.attn} @ matmul : in1    ->  {ours}.attn.hook_k  : b h d p -> b p h d
            {theirs}.{names.attn} @ matmul#1 : in1  ->  {ours}.attn.hook_v  : b h p d -> b p h d
        """
        )
    for path, hook in ((names.q, "hook_q"), (names.k, "hook_k"), (names.v, "hook_v")):
        rows += f"{theirs}.{path}  ->  {ours}.attn.{hook}  : b p (h d) -> b p h d\n"
    return rows


def _place(block: str, path: str) -> str:
    return f"{block} {path}" if path.startswith("@") else f"{block}.{path}"
