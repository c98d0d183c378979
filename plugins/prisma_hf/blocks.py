"""transformers' blocks: facts, weight rows and hook rows, given where each class keeps its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from prisma_core.adapter import Reader
from prisma_core.reading import linear_rows, masks_as_built, norm_rows
from prisma_core.spec import AttentionSpec, BlockSpec, MlpSpec, NormSpec
from prisma_hf import parts
from prisma_hf.names import BlockNames


def block(module: Reader, names: BlockNames, shared_bias: bool = False) -> BlockSpec:
    """Return the facts of a block.

    Args:
        shared_bias: a table that all blocks share is added to the scores.
    """
    names = _resolved(module, names)
    if names.single and getattr(module, names.single) != 1:
        raise module.unsupported("several experts in place of an MLP")
    for path in names.absent:
        if parts.norm(parts.walk(module, path)) is not None:
            raise module.unsupported(f"a norm at {path}, with which upstream itself fails")
    return BlockSpec(
        attn=_attention(module, names, shared_bias),
        mlp=_mlp(module, names),
        ln1=parts.norm(parts.walk(module, names.ln1)),
        ln2=parts.norm(parts.walk(module, names.ln2)),
        attn_scale=_scaled(module, names.ls1),
        mlp_scale=_scaled(module, names.ls2),
    )


def _resolved(module: Reader, names: BlockNames) -> BlockNames:
    """Return the names of a block whose MLP may be a gated one."""
    at = names.mlp
    if names.gate or not module.has(at) or not parts.walk(module, at).has("gate_proj"):
        return names
    gated = {"gate": f"{at}.gate_proj", "fc1": f"{at}.up_proj", "fc2": f"{at}.down_proj", "act": f"{at}.act_fn"}
    return replace(names, **gated)


def _attention(module: Reader, names: BlockNames, shared_bias: bool) -> AttentionSpec:
    attn = parts.walk(module, names.attn)
    masks_as_built(attn)
    heads = getattr(attn, names.heads)
    out = parts.linear(parts.walk(module, names.out))
    width = out.in_features // heads
    return AttentionSpec(
        n_heads=heads,
        n_kv_heads=heads,
        d_head=width,
        scale=float(getattr(attn, names.scale)) if names.scale else width**-0.5,
        bias=shared_bias or (bool(names.bias) and parts.find(module, names.bias) is not None),
        qk_norm=_qk_norm(module, names, width)[0],
        qk_norm_over=_qk_norm(module, names, width)[1],
    )


def _qk_norm(module: Reader, names: BlockNames, width: int) -> tuple[NormSpec | None, Literal["head", "all_heads"]]:
    if not names.q_norm:
        return None, "head"
    q_norm, k_norm = parts.walk(module, names.q_norm), parts.walk(module, names.k_norm)
    if parts.norm(q_norm) != parts.norm(k_norm):
        raise module.unsupported("queries and keys normed differently")
    if parts.norm(q_norm) is None:
        return None, "head"
    return parts.norm(q_norm), "head" if q_norm.weight.numel() == width else "all_heads"


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
    return not (scale is None or (isinstance(scale, float) and scale == 1.0))


def rows(layers: Reader, at: str, names: BlockNames) -> str:
    """Return the weight rows of all blocks."""
    first = next(iter(layers))
    names = _resolved(first, names)
    theirs, ours = f"{at}.{{l}}", "blocks.{l}"
    if names.qkv:
        rows = linear_rows(f"{theirs}.{names.qkv}", f"{ours}.attn.qkv")
    else:
        projections = (names.q, names.k, names.v)
        weights = ", ".join(f"{theirs}.{path}.weight" for path in projections)
        biased = [parts.linear(parts.walk(first, path)).has("bias") for path in projections]
        biases = [f"{theirs}.{path}.bias" if bias else None for path, bias in zip(projections, biased, strict=True)]
        rows = f"""
            [{weights}]                  ->  {ours}.attn.qkv.weight
            {parts.joined_bias(biases)}  ->  {ours}.attn.qkv.bias
        """
    norms = ((names.ln1, "ln1"), (names.ln2, "ln2"), (names.q_norm, "attn.q_norm"), (names.k_norm, "attn.k_norm"))
    for source, target in norms:
        rows += norm_rows(f"{theirs}.{source}", f"{ours}.{target}") if source else ""
    linears = {"attn.out": names.out, "mlp.fc_in": names.fc1, "mlp.fc_gate": names.gate, "mlp.fc_out": names.fc2}
    for target, source in linears.items():
        rows += linear_rows(f"{theirs}.{source}", f"{ours}.{target}") if source else ""
    for source, target in ((names.ls1, "ls1"), (names.ls2, "ls2")):
        rows += f"{theirs}.{source}  ->  {ours}.{target}.gamma\n" if source else ""
    return rows


def hooks(layers: Reader, at: str, names: BlockNames, *, rope: bool = False) -> str:
    """Return the hook rows of all blocks.

    Args:
        rope: queries and keys are turned.
    """
    theirs, ours = f"{at}.{{l}}", "blocks.{l}"
    first = next(iter(layers))
    names = _resolved(first, names)
    scaled = _scaled(first, names.ls1)
    attn_out = names.attn_out if scaled and names.attn_out else names.addend or names.out
    mlp_out = names.mlp_out if scaled and names.mlp_out else names.fc2
    batch_first = "p b (h d)" if names.pos_first else "b p (h d)"
    rows = f"""
        {theirs} : in                         ->  {ours}.hook_resid_pre
        {theirs}.{names.ln1}                  ->  {ours}.ln1.hook_normalized
        {theirs}.{names.attn} @ softmax : in  ->  {ours}.attn.hook_attn_scores
        {theirs}.{names.attn} @ softmax       ->  {ours}.attn.hook_pattern
        {theirs}.{names.out} : in             ->  {ours}.attn.hook_z        : {batch_first} -> b p h d
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
    matmul = f"{theirs}.{names.attn} @ matmul"
    if rope:
        rows += f"""
            {matmul} : in   ->  {ours}.attn.hook_rot_q  : b h p d -> b p h d
            {matmul} : in1  ->  {ours}.attn.hook_rot_k  : b h d p -> b p h d
        """
    if names.qkv:
        rows += f"""
            {matmul} : in     ->  {ours}.attn.hook_q  : b h p d -> b p h d
            {matmul} : in1    ->  {ours}.attn.hook_k  : b h d p -> b p h d
            {matmul}#1 : in1  ->  {ours}.attn.hook_v  : b h p d -> b p h d
        """
        return rows
    q, k = names.q_norm or names.q, names.k_norm or names.k
    if names.q_norm:
        rows += f"""
            {theirs}.{q}  ->  {ours}.attn.q_norm.hook_normalized
            {theirs}.{k}  ->  {ours}.attn.k_norm.hook_normalized
        """
    for path, hook in ((q, "hook_q"), (k, "hook_k"), (names.v, "hook_v")):
        rows += f"{theirs}.{path}  ->  {ours}.attn.{hook}  : b p (h d) -> b p h d\n"
    return rows


def _place(block: str, path: str) -> str:
    return f"{block} {path}" if path.startswith("@") else f"{block}.{path}"
