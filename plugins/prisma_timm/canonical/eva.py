"""timm.models.eva.Eva: EVA, EVA-02, DINOv3, PE and the RoPE ViTs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar, Literal

from torch import nn

from prisma_core.plugin import (
    Adapter,
    AttentionSpec,
    BlockSpec,
    HookMap,
    ModelSpec,
    Reader,
    RopeSpec,
    TokenLayout,
    WeightMap,
    linear_rows,
    norm_rows,
    same_for_all,
)
from prisma_timm.canonical import common, latents
from prisma_timm.canonical import rope as ropes
from prisma_timm.canonical.blocks import pattern_hooks, stream_hooks

ATTENTIONS = ("timm.models.eva.EvaAttention", "timm.layers.attention.AttentionRope")
BLOCK_TYPES: dict[str, Literal["pre", "res_post"]] = {
    "timm.models.eva.EvaBlock": "pre",
    "timm.models.eva.EvaBlockPostNorm": "res_post",
    "timm.models.deepseek_vit.DeepseekVitBlock": "pre",
}
IGNORED = {
    "EvaAttention.qkv_bias_separate": "when the bias is added changes nothing",
    "EvaAttention.[kv]_bias": "there if q_bias is",
    "EvaAttention.rotate_half": "read where there are rotary positions",
    "AttentionRope.rotate_half": "read where there are rotary positions",
    "*.q_bias": "read where queries, keys and values share a projection",
    "*.[qkv]_proj": "read where queries, keys and values have projections of their own",
    "AttentionRope.num_kv_groups": "heads divided by key and value heads",
    "AttentionRope.attn_dim": "heads times their width",
    "AttentionRope.kv_dim": "key and value heads times their width",
}


def block(module: Reader) -> BlockSpec:
    """Return the facts of a block with rotary attention.

    Raises:
        UnsupportedArchitecture: it is another kind of block, or has gated attention.
    """
    kind = next((kind for name, kind in BLOCK_TYPES.items() if module.is_a(name)), None)
    if kind is None:
        raise module.unsupported("its kind of block")
    return BlockSpec(
        kind=kind,
        attn=_attention(module.attn),
        mlp=common.mlp(module.mlp),
        ln1=common.norm(module.norm1),
        ln2=common.norm(module.norm2),
        attn_scale=module.has("gamma_1"),
        mlp_scale=module.has("gamma_2"),
    )


def _attention(attn: Reader) -> AttentionSpec:
    if not attn.is_a(*ATTENTIONS):
        raise attn.unsupported("its kind of attention")
    if attn.has("gate"):
        raise attn.unsupported("gated attention")
    return common.heads(attn, n_kv_heads=attn.get("num_kv_heads", attn.num_heads), inner_norm=common.norm(attn.norm))


def turning(blocks: Reader) -> Literal["interleaved", "half"]:
    """Return which channels the blocks' attentions turn together."""
    half = bool(blocks[0].attn.rotate_half)
    for one in blocks:
        if bool(one.attn.rotate_half) != half:
            raise one.attn.unsupported("positions that turn other channels than those of the first block")
    return "half" if half else "interleaved"


def block_rows(module: Reader, source: str, target: str) -> str:
    """Return the weight rows of one block."""
    return (
        norm_rows(f"{source}.norm1", f"{target}.ln1")
        + _attention_rows(module.attn, f"{source}.attn", f"{target}.attn")
        + norm_rows(f"{source}.norm2", f"{target}.ln2")
        + common.mlp_rows(module.mlp, f"{source}.mlp", f"{target}.mlp")
        + f"""
        {source}.gamma_1  ->  {target}.ls1.gamma
        {source}.gamma_2  ->  {target}.ls2.gamma
        """
    )


def _attention_rows(attn: Reader, source: str, target: str) -> str:
    if not attn.has("qkv"):
        rows = common.READ.qkv_rows(attn, source, f"{target}.qkv")
    else:
        separate = attn.has("q_bias")
        bias = f"[{source}.q_bias, {source}.k_bias, {source}.v_bias]" if separate else f"{source}.qkv.bias | zeros"
        rows = f"""
            {source}.qkv.weight  ->  {target}.qkv.weight
            {bias}               ->  {target}.qkv.bias
        """
    return (
        rows
        + norm_rows(f"{source}.q_norm", f"{target}.q_norm")
        + norm_rows(f"{source}.k_norm", f"{target}.k_norm")
        + norm_rows(f"{source}.norm", f"{target}.ln")
        + linear_rows(f"{source}.proj", f"{target}.out")
    )


def block_hooks(module: Reader, source: str, target: str) -> str:
    """Return the hook rows of one block; ``h`` is its number of heads, ``w`` their width."""
    attn, to = f"{source}.attn", f"{target}.attn"
    values = f"{attn} @ matmul#1 : in1 -> {to}.hook_v : b h p d -> b p h d"
    if not module.attn.has("qkv"):  # grouped values are repeated before that product
        values = f"{attn}.v_proj -> {to}.hook_v : b p (k w) -> b p k w"
    return (
        f"""
        {values}
        {attn}.q_norm       ->  {to}.hook_q      : b h p d -> b p h d
        {attn}.k_norm       ->  {to}.hook_k      : b k p d -> b p k d
        {attn} @ type_as    ->  {to}.hook_rot_q  : b h p d -> b p h d
        {attn} @ type_as#1  ->  {to}.hook_rot_k  : b k p d -> b p k d
        """
        + stream_hooks(source, target, middle="mlp" if module.is_a("timm.models.eva.EvaBlockPostNorm") else "norm2")
        + pattern_hooks(attn, to, z="norm")
        + common.mlp_hooks(module.mlp, f"{source}.mlp", f"{target}.mlp")
    )


class EvaAdapter(Adapter):
    """Pre-norm or post-norm blocks, learned or rotary positions, class and register tokens."""

    types = ("timm.models.eva.Eva",)
    ignored: ClassVar[Mapping[str, str]] = {
        **common.IGNORED,
        **ropes.IGNORED,
        **IGNORED,
        "Eva.cls_embed": "read from class token and registers",
        "Eva.rope_mixed": "read from the rotary embedding",
        "Eva.global_pool": "read where there is no attention pooling",
    }

    def spec(self, upstream: Reader) -> ModelSpec:
        patch = upstream.patch_embed
        rows, columns = common.grid(patch)
        layout = TokenLayout(
            cls=int(upstream.has("cls_token")),
            registers=upstream.reg_token.shape[1] if upstream.has("reg_token") else 0,
            rows=rows,
            columns=columns,
        )
        dynamic = bool(upstream.dynamic_img_size)
        rope = _rope(upstream, dynamic)
        mapped = upstream.has("attn_pool")
        pool = latents.pool(upstream.attn_pool, with_prefix=True) if mapped else common.pool(upstream)
        return ModelSpec(
            d_model=upstream.embed_dim,
            image_size=patch.img_size,
            embed=common.patch_embed(
                patch, pos=upstream.has("pos_embed"), dynamic=dynamic and (rope is None or rope.grid is not None)
            ),
            layout=layout,
            blocks=tuple(block(one) for one in upstream.blocks),
            rope=rope,
            ln_pre=common.norm(upstream.norm_pre),
            ln_final=common.norm(upstream.norm),
            pool=pool,
            ln_pool=common.norm(upstream.fc_norm),
            d_pool=upstream.attn_pool.out_features if mapped else upstream.embed_dim,
            n_classes=common.classes(upstream.head),
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        prefix = [name for name in ("cls_token", "reg_token") if upstream.has(name)]
        position = "[zeros, pos_embed]" if upstream.no_embed_class and prefix else "pos_embed"
        table = (
            linear_rows("patch_embed.proj", "embed.proj")
            + norm_rows("patch_embed.norm", "embed.norm")
            + f"""
            [{", ".join(prefix)}]  ->  embed.prefix     :  1 n d -> n d
            {position}             ->  embed.pos_embed  :  1 p d -> p d
            """
            + same_for_all(upstream, [block_rows(one, "blocks.{l}", "blocks.{l}") for one in upstream.blocks])
            + common.end_rows()
        )
        if upstream.has("attn_pool"):
            table += "\n" + latents.pool_rows(upstream.attn_pool, "attn_pool")
        if spec.rope is None:
            return WeightMap.parse(table)
        tables = ropes.rope_tables(upstream.rope, spec.rope, spec.layout)
        return WeightMap.parse(table + ropes.rope_rows(upstream.rope, "rope"), {"rope": tables})

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        as_grid = "  : b r c d -> b (r c) d" if upstream.dynamic_img_size else ""
        table = f"""
            patch_embed    ->  hook_embed {as_grid}
            norm_pre : in  ->  hook_full_embed
        """
        table += common.END_HOOKS
        at = "blocks.{l}"
        table += same_for_all(upstream, [block_hooks(one, at, at) for one in upstream.blocks])
        sizes = {"h": spec.blocks[0].attn.n_heads, "w": spec.blocks[0].attn.d_head}
        if upstream.has("attn_pool"):
            table += latents.pool_hooks(upstream.attn_pool, "attn_pool")
            sizes["n"] = upstream.attn_pool.num_heads
        return HookMap.parse(table, **sizes)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return common.explicit_attention(upstream)


def _rope(upstream: Reader, dynamic: bool) -> RopeSpec | None:
    if not upstream.has("rope"):
        return None
    spec = ropes.rope(upstream.rope, turning(upstream.blocks), dynamic)
    if spec.per_layer != bool(upstream.rope_mixed):
        raise upstream.unsupported("rotary tables that are shared against their kind")
    return spec
