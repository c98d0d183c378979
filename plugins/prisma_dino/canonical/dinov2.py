"""transformers' DINOv2, with and without registers: model, classifier and backbone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from prisma_core.plugin import (
    Adapter,
    EmbedSpec,
    HookMap,
    Interpolation,
    ModelSpec,
    PoolSpec,
    Reader,
    TokenLayout,
    WeightMap,
    eager_attention,
    plain_patches,
    same_for_all,
)
from prisma_dino.canonical import backbones, blocks

PLAIN, WITH = blocks.V2, blocks.V2_REGISTERS
MODELS = (f"{PLAIN}Model", f"{WITH}Model")
CLASSIFIERS = {f"{PLAIN}ForImageClassification": "dinov2", f"{WITH}ForImageClassification": "dinov2_with_registers"}
BACKBONES = (f"{PLAIN}Backbone", f"{WITH}Backbone")
# What each class of embeddings does to positions for another image size; both in float32.
EMBEDDINGS = {
    f"{PLAIN}Embeddings": Interpolation(antialias=False),
    f"{WITH}Embeddings": Interpolation(antialias=True),
}


class _Tower(NamedTuple):
    """The module that holds embeddings, blocks and norm, and its path with a dot."""

    reader: Reader
    at: str


def _tower(upstream: Reader) -> _Tower:
    for name, path in CLASSIFIERS.items():
        if upstream.is_a(name):
            return _Tower(getattr(upstream, path), f"{path}.")
    return _Tower(upstream, "")


class Dinov2Adapter(Adapter):
    """Dinov2 and Dinov2WithRegisters: Model, ForImageClassification, Backbone.

    A model's main output is its pooled one, the normed class token; ``hook_ln_final`` holds all tokens.
    """

    types = (*MODELS, *CLASSIFIERS, *BACKBONES)
    ignored: ClassVar[Mapping[str, str]] = blocks.IGNORED

    def spec(self, upstream: Reader) -> ModelSpec:
        tower = _tower(upstream).reader
        layout, embed, size = _embeddings(tower.embeddings)
        d_model = tower.embeddings.patch_embeddings.projection.out_channels
        pool, d_pool, n_classes, ln_final = PoolSpec(kind="token"), d_model, None, True
        if upstream.is_a(*CLASSIFIERS):
            pool, d_pool = PoolSpec(kind="token_and_avg"), 2 * d_model
            n_classes = blocks.READ.classes(upstream.classifier)
        elif upstream.is_a(*BACKBONES):
            pool, ln_final = backbones.pool(upstream, tower.encoder.layer), upstream.config.apply_layernorm
        return ModelSpec(
            d_model=d_model,
            image_size=size,
            embed=embed,
            layout=layout,
            blocks=tuple(blocks.block(one) for one in tower.encoder.layer),
            ln_final=blocks.READ.norm(tower.layernorm) if ln_final else None,
            pool=pool,
            d_pool=d_pool,
            n_classes=n_classes,
        )

    def weights(self, upstream: Reader, spec: ModelSpec) -> WeightMap:
        tower, at = _tower(upstream)
        embeddings, n = f"{at}embeddings", spec.layout.registers
        positions = f"{embeddings}.position_embeddings -> embed.pos_embed : " + ("{around}" if n else "1 p d -> p d")
        rows = f"""
            {embeddings}.patch_embeddings.projection.{{*}}  ->  embed.proj.{{*}}
            [{embeddings}.cls_token{f", {embeddings}.register_tokens" if n else ""}] -> embed.prefix : 1 n d -> n d
            {positions}
            classifier.{{*}}  ->  head.{{*}}
            ignore {embeddings}.mask_token : stands for patches that the caller hides in training
        """
        rows += _final_norm(f"{at}layernorm", spec)
        layers = [blocks.block_rows(one, f"{at}encoder.layer.{{l}}") for one in tower.encoder.layer]
        functions = {"around": around_registers(n)} if n else {}
        return WeightMap.parse(rows + same_for_all(upstream, layers), functions)

    def hooks(self, upstream: Reader, spec: ModelSpec) -> HookMap:
        tower, at = _tower(upstream)
        rows = f"""
            {at}embeddings.patch_embeddings  ->  hook_embed
            {at}embeddings                   ->  hook_full_embed
            {at}layernorm                    ->  ln_final.hook_normalized
            {at}layernorm                    ->  hook_ln_final
        """
        if upstream.is_a(*CLASSIFIERS):
            rows += """
                classifier : in  ->  hook_pooled
                classifier       ->  hook_logits
            """
        elif upstream.is_a(*BACKBONES):
            rows += backbones.output_rows(upstream, "layernorm" if spec.ln_final else "encoder.layer")
        else:
            rows += """
                @ getitem  ->  hook_pooled
                @ getitem  ->  hook_logits
            """
        layers = [blocks.block_hooks(one, f"{at}encoder.layer.{{l}}", rope=False) for one in tower.encoder.layer]
        return HookMap.parse(rows + same_for_all(upstream, layers), h=spec.blocks[0].attn.n_heads)

    def output(self, result: Any) -> Tensor:
        return backbones.main_output(result)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager_attention(upstream)


def _embeddings(module: Reader) -> tuple[TokenLayout, EmbedSpec, tuple[int, int]]:
    how = next((how for name, how in EMBEDDINGS.items() if module.is_a(name)), None)
    if how is None:
        raise module.unsupported("its kind of embeddings")
    patches = module.patch_embeddings
    if not patches.is_a(f"{PLAIN}PatchEmbeddings", f"{WITH}PatchEmbeddings"):
        raise patches.unsupported("its kind of patches")
    plain_patches(patches.projection)
    height, width = patches.image_size
    down, across = patches.projection.kernel_size
    rows, columns = height // down, width // across
    # Upstream takes the root of their number for both sides of the grid of positions.
    if height != width or rows != columns:
        raise module.unsupported("positions for an image that is not square")
    if 1 + rows * columns != module.position_embeddings.shape[1]:
        raise module.unsupported("positions of another number than the patches'")
    registers = module.register_tokens.shape[1] if module.has("register_tokens") else 0
    if module.is_a(f"{WITH}Embeddings") and module.config.num_register_tokens != registers:
        raise module.unsupported("registers of another number than the config's")  # upstream pools by the config's
    layout = TokenLayout(cls=1, registers=registers, rows=rows, columns=columns)
    embed = EmbedSpec(patch=(down, across), in_channels=patches.projection.in_channels, interpolation=how)
    return layout, embed, (height, width)


def around_registers(n: int) -> Callable[..., Tensor]:
    """Return what makes positions ``[1 pos d]`` of class token and patches those of all tokens ``[pos d]``."""

    def around(positions: Tensor) -> Tensor:
        cls, patches = positions[0, :1], positions[0, 1:]
        return torch.cat([cls, cls.new_zeros(n, cls.shape[1]), patches])

    return around


def _final_norm(source: str, spec: ModelSpec) -> str:
    if spec.ln_final is None:
        return f"ignore {source}.{{*}} : this backbone returns what comes before the norm\n"
    return f"{source}.{{*}} -> ln_final.{{*}}\n"
