"""transformers' blocks: facts, weight rows and hook rows, given where each class keeps its parts."""

from __future__ import annotations

from typing import Literal

from prisma_core.plugin import (
    AttentionSpec,
    BlockSpec,
    MlpNames,
    NormSpec,
    Reader,
    linear_rows,
    masks_as_built,
    norm_rows,
)
from prisma_hf.canonical import parts
from prisma_hf.canonical.names import BlockNames


def block(module: Reader, names: BlockNames, shared_bias: bool = False) -> BlockSpec:
    """Return the facts of a block.

    Args:
        shared_bias: a table that all blocks share is added to the scores.
    """
    if names.single and getattr(module, names.single) != 1:
        raise module.unsupported("several experts in place of an MLP")
    for path in names.absent:
        if parts.norm(parts.at(module, path)) is not None:
            raise module.unsupported(f"a norm at {path}, with which upstream itself fails")
    return BlockSpec(
        attn=_attention(module, names, shared_bias),
        mlp=parts.READ.mlp(module, _mlp_names(module, names)),
        ln1=parts.norm(parts.at(module, names.ln1)),
        ln2=parts.norm(parts.at(module, names.ln2)),
        attn_scale=_scaled(module, names.ls1),
        mlp_scale=_scaled(module, names.ls2),
    )


def _mlp_names(module: Reader, names: BlockNames) -> MlpNames:
    """Return the paths of a block's MLP, which may be a gated one."""
    path = names.mlp
    if module.has(path) and parts.at(module, path).has("gate_proj"):
        return MlpNames(f"{path}.up_proj", f"{path}.down_proj", f"{path}.act_fn", fc_gate=f"{path}.gate_proj")
    return MlpNames(names.fc1, names.fc2, names.act)


# Attentions that derive from another class of the library and compute the same, by torch's kernel.
DERIVED = ("transformers.models.data2vec.modeling_data2vec_vision.Data2VecVisionSdpaSelfAttention",)


def _attention(module: Reader, names: BlockNames, shared_bias: bool) -> AttentionSpec:
    attn = parts.at(module, names.attn)
    masks_as_built(attn)
    attn.is_a(*DERIVED)
    for path in filter(None, (names.qkv,) if names.qkv or names.mha else (names.q, names.k, names.v)):
        parts.linear(parts.at(module, path))
    read = parts.linear(parts.at(module, names.out)).in_features
    width = getattr(attn, names.width) if names.width else read // getattr(attn, names.heads)
    return AttentionSpec(
        n_heads=read // width,
        n_kv_heads=_kv_width(module, names, read) // width,
        d_head=width,
        scale=float(getattr(attn, names.scale)) if names.scale else width**-0.5,
        bias=shared_bias or (bool(names.bias) and parts.find(module, names.bias) is not None),
        qk_norm=_qk_norm(module, names)[0],
        qk_norm_over=_qk_norm(module, names)[1],
    )


def _kv_width(module: Reader, names: BlockNames, read: int) -> int:
    """Return the width of all keys together, and of all values."""
    if names.mha:
        attn = parts.READ.multihead(parts.at(module, names.attn))
        if module.has("attn_mask"):
            raise attn.unsupported("patches hidden from others")
        if attn.batch_first != (names.axes == "b p"):
            raise attn.unsupported(f"batch_first={attn.batch_first} in a stream of the other order")
        return read
    if names.qkv:
        return read
    k, v = (parts.at(module, path) for path in (names.k, names.v))
    if k.out_features != v.out_features:
        raise module.unsupported("fewer heads of keys than of values, or the other way round")
    return k.out_features


def _qk_norm(module: Reader, names: BlockNames) -> tuple[NormSpec | None, Literal["head", "all_heads"]]:
    if not names.q_norm:
        return None, "head"
    q_norm, k_norm = parts.at(module, names.q_norm), parts.at(module, names.k_norm)
    norm = parts.READ.qk_norm(q_norm, k_norm)
    return norm, "head" if norm is None or names.normed_apart else "all_heads"


def _scaled(module: Reader, path: str) -> bool:
    """Return whether there is a learned scale; upstream has the number one in its place where there is none."""
    if not path:
        return False
    above, _, name = path.rpartition(".")
    owner = parts.at(module, above)
    if owner.is_a("Identity"):
        return False
    scale = getattr(owner, name)
    return not (scale is None or (isinstance(scale, float) and scale == 1.0))


def rows(layers: Reader, at: str, names: BlockNames) -> str:
    """Return the weight rows of all blocks."""
    first = layers[0]
    theirs, ours = f"{at}.{{l}}", "blocks.{l}"
    if names.mha:
        rows = f"""
            {theirs}.{names.attn}.in_proj_weight        ->  {ours}.attn.qkv.weight
            {theirs}.{names.attn}.in_proj_bias | zeros  ->  {ours}.attn.qkv.bias
        """
    elif names.qkv:
        rows = linear_rows(f"{theirs}.{names.qkv}", f"{ours}.attn.qkv")
    else:
        rows = parts.READ.qkv_rows(first, theirs, f"{ours}.attn.qkv", (names.q, names.k, names.v))
    norms = ((names.ln1, "ln1"), (names.ln2, "ln2"), (names.q_norm, "attn.q_norm"), (names.k_norm, "attn.k_norm"))
    for source, target in norms:
        rows += norm_rows(f"{theirs}.{source}", f"{ours}.{target}") if source else ""
    rows += linear_rows(f"{theirs}.{names.out}", f"{ours}.attn.out")
    rows += parts.READ.mlp_rows(first, theirs, f"{ours}.mlp", _mlp_names(first, names))
    for source, target in ((names.ls1, "ls1"), (names.ls2, "ls2")):
        rows += f"{theirs}.{source}  ->  {ours}.{target}.gamma\n" if source else ""
    return rows


def hooks(layers: Reader, at: str, names: BlockNames, *, rope: bool = False) -> str:
    """Return the hook rows of all blocks; ``w`` is the width of a head.

    Args:
        rope: queries and keys are turned.
    """
    theirs, ours = f"{at}.{{l}}", "blocks.{l}"
    first = layers[0]
    mlp = _mlp_names(first, names)
    scaled = _scaled(first, names.ls1)
    attn_out = names.attn_out if scaled and names.attn_out else names.addend or names.out
    mlp_out = names.mlp_out if scaled and names.mlp_out else mlp.fc_out
    stream = stream_axes(names)
    rows = f"""
        {theirs} : in                         ->  {ours}.hook_resid_pre       {stream}
        {theirs}.{names.ln1}                  ->  {ours}.ln1.hook_normalized  {stream}
        {theirs}.{names.attn} @ softmax : in  ->  {ours}.attn.hook_attn_scores
        {theirs}.{names.attn} @ softmax       ->  {ours}.attn.hook_pattern
        {_place(theirs, attn_out)}            ->  {ours}.hook_attn_out        {stream}
        {theirs}.{names.ln2} : in             ->  {ours}.hook_resid_mid       {stream}
        {theirs}.{names.ln2}                  ->  {ours}.ln2.hook_normalized  {stream}
        {_place(theirs, mlp_out)}             ->  {ours}.hook_mlp_out         {stream}
        {theirs}                              ->  {ours}.hook_resid_post      {stream}
    """
    rows += parts.READ.mlp_hooks(first, theirs, f"{ours}.mlp", mlp, how=stream)
    return rows + _attention_hooks(names, theirs, ours, rope=rope)


def stream_axes(names: BlockNames) -> str:
    """Return what stands behind a hook row for what is laid out as upstream's stream."""
    return "" if names.axes == "b p" else f": {names.axes} m -> {_ours(names.axes)} m"


def _ours(axes: str) -> str:
    return "batch p" if axes == "(batch p)" else "b p"


def _attention_hooks(names: BlockNames, theirs: str, ours: str, *, rope: bool) -> str:
    heads, split = "b p h w", f"{names.axes} (h w) -> {_ours(names.axes)} h w"
    apart = "b h p w -> b p h w" if names.axes != "(batch p)" else "1 h (batch p) w -> batch p h w"
    attn = f"{theirs}.{names.attn}"
    if names.mha:  # step by step it is given the batch first
        split = f"b p (h w) -> {heads}"
        return f"""
            {attn} @ linear         ->  {ours}.attn.hook_q  : {split}
            {attn} @ linear#1       ->  {ours}.attn.hook_k  : {split}
            {attn} @ linear#2       ->  {ours}.attn.hook_v  : {split}
            {attn} @ linear#3 : in  ->  {ours}.attn.hook_z  : {split}
        """
    z = f"{names.out_axes} (h w) -> {heads}" if names.out_axes else split
    rows = f"{theirs}.{names.out} : in  ->  {ours}.attn.hook_z  : {z}\n"
    if rope:
        q = f"{attn} {names.rot_q}" if names.rot_q else f"{attn} @ matmul : in"
        k = f"{attn} {names.rot_k}" if names.rot_k else f"{attn} @ matmul : in1"
        rows += f"""
            {q}  ->  {ours}.attn.hook_rot_q  : {apart}
            {k}  ->  {ours}.attn.hook_rot_k  : {apart if names.rot_k else f"b h w p -> {heads}"}
        """
    if names.qkv and names.axes == "(batch p)":
        taken = f"{names.axes} h w -> batch p h w"
        return (
            rows
            + f"""
            {attn} @ unbind         ->  {ours}.attn.hook_q  : {taken}
            {attn} @ unbind : out1  ->  {ours}.attn.hook_k  : {taken}
            {attn} @ unbind : out2  ->  {ours}.attn.hook_v  : {taken}
        """
        )
    if names.qkv:
        return (
            rows
            + f"""
            {attn} @ matmul : in     ->  {ours}.attn.hook_q  : {apart}
            {attn} @ matmul : in1    ->  {ours}.attn.hook_k  : b h w p -> {heads}
            {attn} @ matmul#1 : in1  ->  {ours}.attn.hook_v  : {apart}
        """
        )
    q, k = names.q_norm or names.q, names.k_norm or names.k
    normed = apart if names.normed_apart else split
    if names.q_norm:
        flat = f"  : {apart}" if names.normed_apart else ""
        rows += f"""
            {theirs}.{q}  ->  {ours}.attn.q_norm.hook_normalized  {flat}
            {theirs}.{k}  ->  {ours}.attn.k_norm.hook_normalized  {flat}
        """
    return (
        rows
        + f"""
        {theirs}.{q}        ->  {ours}.attn.hook_q  : {normed}
        {theirs}.{k}        ->  {ours}.attn.hook_k  : {normed}
        {theirs}.{names.v}  ->  {ours}.attn.hook_v  : {split}
    """
    )


def _place(block: str, path: str) -> str:
    return f"{block} {path}" if path.startswith("@") else f"{block}.{path}"
