"""transformers' DINOv3 ViT: model and backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

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
    eager_attention,
    plain_patches,
    same_for_all,
)
from prisma_dino.canonical import backbones, blocks

BACKBONE = f"{blocks.V3}Backbone"
ROPE = "DINOv3ViTRopePositionEmbedding"


class Dinov3Adapter(Adapter):
    """DINOv3ViTModel and DINOv3ViTBackbone.

    A model's main output is its pooled one, the normed class token; ``hook_ln_final`` holds all tokens.
    """

    types = (f"{blocks.V3}Model", BACKBONE)
    ignored: ClassVar[Mapping[str, str]] = {
        **blocks.IGNORED,
        f"{ROPE}.base": "what the frequencies were made from; they are read",
        f"{ROPE}.head_dim": "what the frequencies were made from; they are read",
    }

    def spec(self, upstream: Reader) -> ModelSpec:
        patch, rope = upstream.embeddings.patch_embeddings, upstream.rope_embeddings
        plain_patches(patch)
        if not rope.is_a(f"{blocks.V3}RopePositionEmbedding"):
            raise rope.unsupported("its kind of rotary embedding")
        sides = _pair(rope.config.patch_size)
        if sides != patch.kernel_size:
            raise rope.unsupported(f"rotary positions for patches of {sides}, not {patch.kernel_size}")
        size = _pair(rope.config.image_size)
        if (size[0] // sides[0], size[1] // sides[1]) != (rope.num_patches_h, rope.num_patches_w):
            raise rope.unsupported(f"config.image_size={size!r}, which has another grid than it was built for")
        registers = upstream.embeddings.register_tokens.shape[1]
        if upstream.is_a(BACKBONE) and upstream.config.num_register_tokens != registers:
            raise upstream.unsupported("registers of another number than the config's")  # upstream cuts by the config's
        layout = TokenLayout(
            cls=1,
            registers=registers,
            rows=rope.num_patches_h,
            columns=rope.num_patches_w,
        )
        grid = RopeGrid(coordinates="radians", waves=_waves(rope.inv_freq))
        pool = backbones.pool(upstream, upstream.model.layer) if upstream.is_a(BACKBONE) else PoolSpec(kind="token")
        return ModelSpec(
            d_model=patch.out_channels,
            image_size=size,
            # Without learned positions there is nothing to interpolate: rotary tables are made for any grid.
            embed=EmbedSpec(
                patch=patch.kernel_size, in_channels=patch.in_channels, pos=False, interpolation=Interpolation()
            ),
            layout=layout,
            blocks=tuple(blocks.block(one) for one in upstream.model.layer),
            rope=RopeSpec(layout="half", grid=grid),
            # Of a backbone's feature maps the last one is normed whatever apply_layernorm says.
            ln_final=blocks.READ.norm(upstream.norm),
            pool=pool,
            d_pool=patch.out_channels,
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        rows = """
            embeddings.patch_embeddings.{*}  ->  embed.proj.{*}
            [embeddings.cls_token, embeddings.register_tokens]  ->  embed.prefix  : 1 n d -> n d
            rope_embeddings.inv_freq  ->  [rope_cos, rope_sin]  : {rope}
            norm.{*}  ->  ln_final.{*}
            ignore embeddings.mask_token : stands for patches that the caller hides in training
        """
        layers = [blocks.block_rows(one, "model.layer.{l}") for one in upstream.model.layer]
        tables = _rope_tables(upstream.rope_embeddings, spec)
        return WeightMap.parse(rows + same_for_all(upstream, layers), {"rope": tables})

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        rows = """
            embeddings.patch_embeddings  ->  hook_embed  : b d r c -> b (r c) d
            embeddings                   ->  hook_full_embed
            norm                         ->  ln_final.hook_normalized
            norm                         ->  hook_ln_final
        """
        if upstream.is_a(BACKBONE):
            rows += backbones.output_rows(upstream, "norm")
        else:
            rows += """
                @ getitem  ->  hook_pooled
                @ getitem  ->  hook_logits
            """
        layers = [blocks.block_hooks(one, "model.layer.{l}", rope=True) for one in upstream.model.layer]
        return HookMap.parse(rows + same_for_all(upstream, layers), h=spec.blocks[0].attn.n_heads)

    def output(self, result: Any) -> Tensor:
        return backbones.main_output(result)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager_attention(upstream)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _waves(tensor: Tensor) -> tuple[float, ...]:
    return () if tensor.is_meta else tuple(tensor.tolist())  # a model without data has no waves, as it has no weights


def _rope_tables(module: Reader, spec: ModelSpec) -> Callable[..., Tensor]:
    """Return the function that makes both tables, one after the other, of the frequencies: upstream's own forward."""
    embed = copy_module(module.module, hooks=False).eval()
    n_prefix, size = spec.layout.n_prefix, spec.image_size

    def tables(waves: Tensor) -> Tensor:
        cos, sin = functional_call(embed, {"inv_freq": waves}, (waves.new_zeros(1, 1, *size),))
        prefix = cos.new_ones(n_prefix, 1, cos.shape[-1])
        return torch.cat([prefix, cos[:, None], torch.zeros_like(prefix), sin[:, None]])

    return tables
