"""The adapter of Meta's own layout: of the module that files are loaded into, and of Meta's classes themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prisma_core.adapter import Adapter, Reader
from prisma_core.hookmap import HookMap
from prisma_core.layout import TokenLayout
from prisma_core.spec import (
    AttentionSpec,
    BlockSpec,
    EmbedSpec,
    Interpolation,
    MlpSpec,
    ModelSpec,
    PoolSpec,
    RopeGrid,
    RopeSpec,
)
from prisma_core.weights import WeightMap
from prisma_dino import blocks
from prisma_dino.dinov2 import around_registers

OURS = "prisma_dino.meta.MetaViT"
V1 = "vision_transformer.VisionTransformer"
V2 = "dinov2.models.vision_transformer.DinoVisionTransformer"
V3 = "dinov3.models.vision_transformer.DinoVisionTransformer"
BLOCKS = ("Block", "NestedTensorBlock", "SelfAttentionBlock")
ATTENTIONS = ("Attention", "MemEffAttention", "SelfAttention")
QKV = ("torch.nn.modules.linear.Linear", "MaskedLinear", "LinearKMaskedBias")
REGISTERS = ("register_tokens", "storage_tokens")
ROPES = ("RopePositions", "RopePositionEmbedding")

IGNORED = {
    "*.num_features": "embed_dim by another name",
    "*.embed_dim": "the width of the patch projection",
    "*.num_tokens": "one class token",
    "*.n_blocks": "the number of blocks",
    "*.num_heads": "read off the attentions",
    "*.patch_size": "the kernel of the patch projection",
    "*.num_register_tokens": "the shape of the registers",
    "*.n_storage_tokens": "the shape of the registers",
    "*.untie_global_and_local_cls_norm": "of training",
    "*.untie_cls_and_patch_norms": "read off its norm",
    "*.interpolate_*": "read where positions are learned",
    "*.side": "the root of the number of positions",
    "*.sample_drop_ratio": "of training",
    "*.fused": "which kernel runs",
    "*.in_features": "the shape of the weights",
    "*.hidden_size": "the shape of the weights",
    "DropPath.*": "off in evaluation",
    "LayerScale.*": "how it is stored",
    "PatchEmbed.*": "the sizes of the patch projection and of pictures",
    "RopePosition*.D_head": "twice two periods",
    "RopePosition*.base": "what the periods were made from",
    "RopePosition*.*_period": "what the periods were made from",
    "RopePosition*.*_coords": "in training; the normalisation is read",
}


class MetaAdapter(Adapter):
    """MetaViT, and the classes of facebookresearch's dino, dinov2 and dinov3 as torch.hub builds them."""

    types = (OURS, V1, V2, V3)
    ignored: ClassVar[Mapping[str, str]] = IGNORED

    def spec(self, upstream: Reader) -> ModelSpec:
        proj = upstream.patch_embed.proj
        blocks.plain_patches(proj)
        if upstream.get("chunked_blocks"):
            raise upstream.unsupported("blocks in chunks (build it with block_chunks=0)")
        if upstream.has("cls_norm"):
            raise upstream.unsupported("a norm of its own for class token and registers")
        if not upstream.head.is_a(blocks.IDENTITY):
            raise upstream.unsupported("a head")
        if upstream.patch_embed.has("norm") and not upstream.patch_embed.norm.is_a(blocks.IDENTITY):
            raise upstream.unsupported("a norm of patches")
        rotary = upstream.has("rope_embed")
        side = _side(upstream, rotary=rotary)
        registers = next((name for name in REGISTERS if upstream.has(name)), None)
        down, across = proj.kernel_size
        return ModelSpec(
            d_model=proj.out_channels,
            image_size=(side * down, side * across),
            embed=EmbedSpec(
                patch=(down, across),
                in_channels=proj.in_channels,
                pos=not rotary,
                interpolation=Interpolation() if rotary else _interpolation(upstream),
            ),
            layout=TokenLayout(
                cls=1,
                registers=getattr(upstream, registers).shape[1] if registers else 0,
                rows=side,
                columns=side,
            ),
            blocks=tuple(_block(block) for block in upstream.blocks),
            rope=_rope(upstream.rope_embed) if rotary else None,
            ln_final=blocks.norm(upstream.norm),
            pool=PoolSpec(kind="token"),
            d_pool=proj.out_channels,
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        n = spec.layout.registers
        prefix = ["cls_token", *(name for name in REGISTERS if upstream.has(name))]
        rows = f"""
            patch_embed.proj.{{*}}  ->  embed.proj.{{*}}
            [{", ".join(prefix)}]   ->  embed.prefix     : 1 n d -> n d
            pos_embed               ->  embed.pos_embed  : {"{around}" if n else "1 p d -> p d"}
            norm.{{*}}              ->  ln_final.{{*}}
            ignore mask_token : stands for patches that the caller hides in training
            ignore local_cls_norm.{{*}} : norms small crops in training
        """
        functions: dict[str, Callable[..., Tensor]] = {"around": around_registers(n), "masked": torch.mul}
        if spec.rope is not None:
            rows += "rope_embed.periods  ->  [rope_cos, rope_sin]  : {rope}\n"
            functions["rope"] = _rope_tables(upstream.rope_embed, spec.layout)
        return WeightMap.parse(
            rows + blocks.same_for_all(upstream, [_block_rows(block) for block in upstream.blocks]), functions
        )

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        rows = """
            patch_embed.proj  ->  hook_embed  : b d r c -> b (r c) d
            blocks.0 : in     ->  hook_full_embed
            norm              ->  ln_final.hook_normalized
            norm              ->  hook_ln_final
            head              ->  hook_pooled
            head              ->  hook_logits
        """
        tables = [_block_hooks(block, rope=spec.rope is not None) for block in upstream.blocks]
        return HookMap.parse(rows + blocks.same_for_all(upstream, tables), h=spec.blocks[0].attn.n_heads)

    def explicit(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return _explicit(upstream)


def _side(upstream: Reader, *, rotary: bool) -> int:
    if upstream.is_a(OURS):
        return upstream.side
    if rotary:
        rows, columns = upstream.patch_embed.patches_resolution
    else:
        rows = columns = round((upstream.pos_embed.shape[1] - 1) ** 0.5)
        if rows * columns != upstream.pos_embed.shape[1] - 1:
            raise upstream.unsupported("positions for a picture that is not square")
    if rows != columns:
        raise upstream.unsupported("a picture that is not square")
    return rows


def _interpolation(upstream: Reader) -> Interpolation:
    return Interpolation(  # the first DINO keeps none of these as attributes
        antialias=bool(upstream.get("interpolate_antialias", False)),
        offset=upstream.get("interpolate_offset", 0.1) or 0.0,
        in_float32=upstream.get("interpolate_in_float32", upstream.is_a(V2)),
    )


def _block(module: Reader) -> BlockSpec:
    if not module.is_a(*BLOCKS):
        raise module.unsupported("its kind of block")
    attn = module.attn
    if not attn.is_a(*ATTENTIONS) or not attn.qkv.is_a(*QKV):
        raise attn.unsupported("its kind of attention")
    width = attn.qkv.out_features // 3
    return BlockSpec(
        attn=AttentionSpec(
            n_heads=attn.num_heads, n_kv_heads=attn.num_heads, d_head=width // attn.num_heads, scale=attn.scale
        ),
        mlp=_mlp(module.mlp),
        ln1=blocks.norm(module.norm1),
        ln2=blocks.norm(module.norm2),
        attn_scale=_scaled(module, "ls1"),
        mlp_scale=_scaled(module, "ls2"),
    )


def _scaled(module: Reader, name: str) -> bool:
    if not module.has(name) or getattr(module, name).is_a(blocks.IDENTITY):
        return False
    if not getattr(module, name).is_a("LayerScale"):
        raise module.unsupported("its kind of layer scale")
    return True


def _mlp(module: Reader) -> MlpSpec:
    if module.is_a("Mlp"):
        return MlpSpec(d_mlp=module.fc1.out_features, act=blocks.activation(module.act))
    if module.has("w3") and (module.has("w12") or module.has("w1")):  # these call silu without keeping it
        return MlpSpec(d_mlp=module.w3.in_features, act="silu", gated=True)
    raise module.unsupported("its kind of MLP")


def _block_rows(module: Reader) -> str:
    at = "blocks.{l}"
    masked = module.attn.qkv.has("bias_mask")
    bias = f"[{at}.attn.qkv.bias, {at}.attn.qkv.bias_mask]" if masked else f"{at}.attn.qkv.bias | zeros"
    rows = f"""
        {at}.norm1.{{*}}        ->  {at}.ln1.{{*}}
        {at}.attn.qkv.weight    ->  {at}.attn.qkv.weight
        {bias}                  ->  {at}.attn.qkv.bias  {": {masked}" if masked else ""}
        {at}.ls1.gamma          ->  {at}.ls1.gamma
        {at}.norm2.{{*}}        ->  {at}.ln2.{{*}}
        {at}.ls2.gamma          ->  {at}.ls2.gamma
    """ + blocks.linear_rows(f"{at}.attn.proj", f"{at}.attn.out")
    if module.mlp.has("w12"):
        rows += f"""
            {at}.mlp.w12.weight        ->  [{at}.mlp.fc_gate.weight, {at}.mlp.fc_in.weight]
            {at}.mlp.w12.bias | zeros  ->  [{at}.mlp.fc_gate.bias, {at}.mlp.fc_in.bias]
        """
        parts = {"w3": "fc_out"}
    elif module.mlp.has("w1"):
        parts = {"w1": "fc_gate", "w2": "fc_in", "w3": "fc_out"}
    else:
        parts = {"fc1": "fc_in", "fc2": "fc_out"}
    return rows + "".join(blocks.linear_rows(f"{at}.mlp.{own}", f"{at}.mlp.{to}") for own, to in parts.items())


def _block_hooks(module: Reader, *, rope: bool) -> str:
    at = "blocks.{l}"
    turned = "rot_" if rope else ""  # both are seen where they are multiplied
    scaled = _scaled(module, "ls1")
    rows = f"""
        {at} : in                  ->  {at}.hook_resid_pre
        {at}.norm1                 ->  {at}.ln1.hook_normalized
        {at}.attn @ matmul : in    ->  {at}.attn.hook_{turned}q      : b h p d -> b p h d
        {at}.attn @ matmul : in1   ->  {at}.attn.hook_{turned}k      : b h d p -> b p h d
        {at}.attn @ matmul#1 : in1 ->  {at}.attn.hook_v              : b h p d -> b p h d
        {at}.attn @ softmax : in   ->  {at}.attn.hook_attn_scores
        {at}.attn @ softmax        ->  {at}.attn.hook_pattern
        {at}.attn.proj : in        ->  {at}.attn.hook_z              : b p (h d) -> b p h d
        {at}.{"ls1" if scaled else "attn"}  ->  {at}.hook_attn_out
        {at}.norm2 : in            ->  {at}.hook_resid_mid
        {at}.norm2                 ->  {at}.ln2.hook_normalized
        {at}.{"ls2" if scaled else "mlp"}   ->  {at}.hook_mlp_out
        {at}                       ->  {at}.hook_resid_post
    """
    if module.mlp.has("w12"):
        return (
            rows
            + f"""
            {at}.mlp @ silu : in  ->  {at}.mlp.hook_pre
            {at}.mlp @ mul : in1  ->  {at}.mlp.hook_pre_linear
            {at}.mlp.w3 : in      ->  {at}.mlp.hook_post
        """
        )
    first, value, last = ("w1", "w2", "w3") if module.mlp.has("w1") else ("fc1", "fc1", "fc2")
    return (
        rows
        + f"""
        {at}.mlp.{first}      ->  {at}.mlp.hook_pre
        {at}.mlp.{value}      ->  {at}.mlp.hook_pre_linear
        {at}.mlp.{last} : in  ->  {at}.mlp.hook_post
    """
    )


def _rope(module: Reader) -> RopeSpec:
    if not module.is_a(*ROPES):
        raise module.unsupported("its kind of rotary embedding")
    if module.dtype not in (torch.float32, None):
        raise module.unsupported(f"rotary positions computed in {module.dtype}")
    periods: Tensor = module.periods
    # Without data there are no waves, as there are no weights.
    waves = () if periods.is_meta else tuple(1 / period for period in periods.tolist())
    return RopeSpec(layout="half", grid=RopeGrid(coordinates="radians", waves=waves, normalize=module.normalize_coords))


def _rope_tables(module: Reader, layout: TokenLayout) -> Callable[..., Tensor]:
    """Return the function that makes both tables, one after the other, of the periods: upstream's own forward."""
    embed = copy.deepcopy(module.module).eval()

    def tables(periods: Tensor) -> Tensor:
        sin, cos = functional_call(embed, {"periods": periods}, kwargs={"H": layout.rows, "W": layout.columns})
        one = cos.new_ones(layout.n_prefix, 1, cos.shape[-1])
        return torch.cat([one, cos[:, None], torch.zeros_like(one), sin[:, None]])

    return tables


@contextmanager
def _explicit(upstream: nn.Module) -> Iterator[None]:
    fused = [part for part in upstream.modules() if getattr(part, "fused", False)]
    for part in fused:
        part.fused = False
    try:
        yield
    finally:
        for part in fused:
            part.fused = True
