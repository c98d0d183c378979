"""The adapter of Meta's own layout: of the module that files are loaded into, and of Meta's classes themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prisma_core.plugin import (
    Adapter,
    EmbedSpec,
    HookMap,
    Interpolation,
    ModelSpec,
    PoolSpec,
    Reader,
    RopeGrid,
    RopeSpec,
    TokenLayout,
    WeightMap,
    copy_module,
    plain_patches,
    same_for_all,
)
from prisma_dino.canonical import meta_blocks
from prisma_dino.canonical.dinov2 import around_registers
from prisma_dino.state import Options, build

OURS = "prisma_dino.meta.MetaViT"
V1 = "vision_transformer.VisionTransformer"
V2 = "dinov2.models.vision_transformer.DinoVisionTransformer"
V3 = "dinov3.models.vision_transformer.DinoVisionTransformer"
V1_HAS = {"num_features", "embed_dim", "patch_embed", "pos_drop", "blocks", "norm", "head", "training"}
REGISTERS = ("register_tokens", "storage_tokens")
ROPES = ("prisma_dino.meta.RopePositions", "dinov3.layers.rope_position_encoding.RopePositionEmbedding")

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
    "*.sample_drop_ratio": "of training",
    "*.fused": "which kernel runs",
    "*Attention.dim": "the shape of the weights",
    "*Attention.attn_drop": "off in evaluation",
    "*.local_cls_norm": "norms small crops in training",
    "*.in_features": "the shape of the weights",
    "*.hidden_size": "the shape of the weights",
    "DropPath.*": "off in evaluation",
    "LayerScale.*": "how it is stored",
    "PatchEmbed.*": "the sizes of the patch projection and of images",
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
        plain_patches(proj)
        if upstream.is_a(V1):  # other repositories have a module of this name, too
            there = {*vars(upstream.module), *dict(upstream.module.named_children())}
            if others := sorted(name for name in there - V1_HAS if not name.startswith("_")):
                raise upstream.unsupported(f"{', '.join(others)}, which facebookresearch/dino's has not")
            _compare_with_meta(upstream)
        if upstream.get("chunked_blocks"):
            raise upstream.unsupported("blocks in chunks (build it with block_chunks=0)")
        if upstream.has("cls_norm"):
            raise upstream.unsupported("a norm of its own for class token and registers")
        if not upstream.head.is_a("Identity"):
            raise upstream.unsupported("a head")
        if upstream.patch_embed.has("norm") and not upstream.patch_embed.norm.is_a("Identity"):
            raise upstream.unsupported("a norm of patches")
        rotary = upstream.has("rope_embed")
        rows, columns = _grid(upstream, rotary=rotary)
        registers = next((name for name in REGISTERS if upstream.has(name)), None)
        down, across = proj.kernel_size
        if not rotary and rows * down != columns * across:
            raise upstream.unsupported("an image that is not square: its positions are resized at their native size")
        return ModelSpec(
            d_model=proj.out_channels,
            image_size=(rows * down, columns * across),
            embed=EmbedSpec(
                patch=(down, across),
                in_channels=proj.in_channels,
                pos=not rotary,
                interpolation=Interpolation() if rotary else _interpolation(upstream),
            ),
            layout=TokenLayout(
                cls=1,
                registers=getattr(upstream, registers).shape[1] if registers else 0,
                rows=rows,
                columns=columns,
            ),
            blocks=tuple(meta_blocks.block(block) for block in upstream.blocks),
            rope=_rope(upstream.rope_embed) if rotary else None,
            ln_final=meta_blocks.READ.norm(upstream.norm),
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
        tables = [meta_blocks.block_rows(block) for block in upstream.blocks]
        return WeightMap.parse(rows + same_for_all(upstream, tables), functions)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        output = "@ getitem" if upstream.is_a(V1) else "head"
        rows = f"""
            patch_embed.proj  ->  hook_embed  : b d r c -> b (r c) d
            blocks.0 : in     ->  hook_full_embed
            norm              ->  ln_final.hook_normalized
            norm              ->  hook_ln_final
            {output}          ->  hook_pooled
            {output}          ->  hook_logits
        """
        # Meta's second generation never takes attention's steps apart.
        stepwise, rope = not upstream.is_a(V2), spec.rope is not None
        tables = [meta_blocks.block_hooks(block, rope=rope, stepwise=stepwise) for block in upstream.blocks]
        return HookMap.parse(rows + same_for_all(upstream, tables), h=spec.blocks[0].attn.n_heads)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return _explicit(upstream)


def _compare_with_meta(upstream: Reader) -> None:
    """Compare one forward with that of Meta's model, whose name, attributes and tensors a fork may share.

    Raises:
        UnsupportedArchitecture: the outputs differ, or the module does not run.
    """
    theirs, proj = copy_module(upstream.module, hooks=False).eval().float(), upstream.patch_embed.proj
    if proj.weight.is_meta:  # without weights there are no numbers
        return
    block = upstream.blocks[0]
    given = Options(heads=block.attn.num_heads, eps=block.norm1.eps)
    ours = build(theirs.state_dict(), upstream.path or "the model", given)
    size = [side * patch for side, patch in zip(_grid(upstream, rotary=False), proj.kernel_size, strict=True)]
    image = torch.linspace(-1, 1, proj.in_channels * size[0] * size[1]).sin_()
    image = image.view(1, proj.in_channels, *size).to(proj.weight.device)
    with torch.no_grad():
        try:
            same = torch.allclose(theirs(image), ours(image), rtol=1e-3, atol=1e-3)  # of size 1, both in float32
        except Exception as error:
            raise upstream.unsupported(f"a forward that fails on an image of {size} ({error})") from error
    if not same:
        raise upstream.unsupported("a forward with another output than facebookresearch/dino's: it is a fork")


def _grid(upstream: Reader, *, rotary: bool) -> tuple[int, int]:
    if upstream.is_a(OURS):
        return upstream.grid
    if rotary:
        rows, columns = upstream.patch_embed.patches_resolution
        return rows, columns
    patches = upstream.pos_embed.shape[1] - 1
    side = math.isqrt(patches)
    if side * side != patches:
        raise upstream.unsupported("positions for an image that is not square")
    return side, side


def _interpolation(upstream: Reader) -> Interpolation:
    in_float32 = upstream.get("interpolate_in_float32", upstream.is_a(V2))
    return Interpolation(  # the first DINO keeps none of these as attributes
        antialias=bool(upstream.get("interpolate_antialias", False)),
        offset=upstream.get("interpolate_offset", 0.1) or 0.0,
        in_float32=in_float32,
        rounded="prefix" if in_float32 else "",
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
    embed = copy_module(module.module, hooks=False).eval()

    def tables(periods: Tensor) -> Tensor:
        sin, cos = functional_call(embed, {"periods": periods}, kwargs={"H": layout.rows, "W": layout.columns})
        one = cos.new_ones(layout.n_prefix, 1, cos.shape[-1])
        return torch.cat([one, cos[:, None], torch.zeros_like(one), sin[:, None]])

    return tables


@contextmanager
def _explicit(upstream: nn.Module) -> Generator[None]:
    fused = [part for part in upstream.modules() if getattr(part, "fused", False)]
    for part in fused:
        part.fused = False
    try:
        yield
    finally:
        for part in fused:
            part.fused = True
