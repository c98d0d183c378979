"""The towers of transformers' CLIP, SigLIP, SigLIP 2, MetaCLIP 2, AltCLIP and ChineseCLIP, each a model of its own."""

from __future__ import annotations

import torch

from prisma_clip.canonical.blocks import mha, mha_hooks
from prisma_clip.canonical.common import READ, linear, norm, norm_hooks, patches
from prisma_clip.canonical.hf_bert import AltText, ChineseText
from prisma_clip.canonical.hf_parts import BLOCKS_HOOKS, MLP, Tower, blocks, blocks_rows, models
from prisma_core import resize_positions
from prisma_core.plugin import (
    AnySpec,
    EmbedSpec,
    HookMap,
    Interpolation,
    ModelSpec,
    PoolSpec,
    Reader,
    TextPoolSpec,
    TextSpec,
    TokenLayout,
    WeightMap,
    linear_rows,
    norm_rows,
)

SIGLIP2 = "transformers.models.siglip2.modeling_siglip2.Siglip2VisionModel"
BICUBIC = Interpolation(antialias=False, in_float32=False)
# In float32: with torch's function on the CPU alone, where antialiasing needs it.
BILINEAR = (
    Interpolation(mode="bilinear", rounded="native"),
    Interpolation(mode="bilinear", rounded="native", weights_in_float32=True),
)


class ClipVision(Tower):
    """A class token, a norm before the blocks, and one of the class token behind them."""

    types = models(
        "clip.modeling_clip.CLIPVisionModel",
        "metaclip_2.modeling_metaclip_2.MetaClip2VisionModel",
        "altclip.modeling_altclip.AltCLIPVisionModel",
        "chinese_clip.modeling_chinese_clip.ChineseCLIPVisionModel",
    )

    def spec(self, upstream: Reader) -> ModelSpec:
        embed = upstream.embeddings
        side = embed.image_size // embed.patch_embedding.kernel_size[0]
        width = READ.positions(embed, "position_embedding").embedding_dim
        if side * side != embed.num_patches:
            raise embed.unsupported(f"{embed.num_patches} patches of an image that is not square")
        return ModelSpec(
            d_model=width,
            image_size=(embed.image_size, embed.image_size),
            embed=patches(embed.patch_embedding, interpolation=BICUBIC),
            layout=TokenLayout(cls=1, rows=side, columns=side),
            blocks=blocks(upstream.encoder, causal=False),
            ln_pre=norm(upstream.pre_layrnorm),
            pool=PoolSpec(kind="token"),
            ln_pool=norm(upstream.post_layernorm),
            d_pool=width,
        )

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        return WeightMap.parse(
            """
            embeddings.class_embedding            ->  embed.prefix  : d -> 1 d
            embeddings.position_embedding.weight  ->  embed.pos_embed
            ignore embeddings.position_ids        :   positions counted from 0
            """
            + linear_rows("embeddings.patch_embedding", "embed.proj")
            + norm_rows("pre_layrnorm", "ln_pre")
            + norm_rows("post_layernorm", "ln_pool")
            + blocks_rows(upstream.encoder)
        )

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, ModelSpec)
        rows = (
            """
            embeddings.patch_embedding  ->  hook_embed  : b d r c -> b (r c) d
            embeddings                  ->  hook_full_embed
            post_layernorm : in         ->  hook_pooled
            post_layernorm              ->  hook_logits
            """
            + norm_hooks("pre_layrnorm", "ln_pre", "hook_ln_pre")
            + norm_hooks("post_layernorm", "ln_pool")
        )
        return HookMap.parse(rows + BLOCKS_HOOKS, h=spec.blocks[0].attn.n_heads)


class SiglipVision(Tower):
    """No class token; the norm behind the blocks, then attention from a learned query."""

    types = models(
        "siglip.modeling_siglip.SiglipVisionModel",
        "siglip2.modeling_siglip2.Siglip2VisionModel",
    )

    def spec(self, upstream: Reader) -> ModelSpec:
        embed = upstream.embeddings
        spec, side = _flat_patches(embed) if upstream.is_a(SIGLIP2) else _square_patches(embed)
        width = READ.positions(embed, "position_embedding").embedding_dim
        has_head = upstream.has("head")
        return ModelSpec(
            d_model=width,
            image_size=(side * spec.patch[0], side * spec.patch[1]),
            embed=spec,
            layout=TokenLayout(rows=side, columns=side),
            blocks=blocks(upstream.encoder, causal=False),
            ln_final=norm(upstream.post_layernorm),
            pool=_attention_pool(upstream.head) if has_head else PoolSpec(kind="none"),
            d_pool=width,
        )

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        assert isinstance(spec, ModelSpec)
        how = "  : d (p q c) -> d c p q" if upstream.is_a(SIGLIP2) else ""
        rows = (
            f"""
            embeddings.position_embedding.weight    ->  embed.pos_embed
            ignore embeddings.position_ids          :   positions counted from 0
            embeddings.patch_embedding.weight       ->  embed.proj.weight {how}
            embeddings.patch_embedding.bias | zeros  ->  embed.proj.bias
            """
            + norm_rows("post_layernorm", "ln_final")
            + blocks_rows(upstream.encoder)
        )
        if spec.pool.kind == "attention":
            rows += (
                """
                head.probe                     ->  pool.attn.latent  : 1 n d -> n d
                head.attention.in_proj_weight  ->  [pool.attn.q.weight, pool.attn.kv.weight]
                head.attention.in_proj_bias    ->  [pool.attn.q.bias, pool.attn.kv.bias]
                """
                + linear_rows("head.attention.out_proj", "pool.attn.out")
                + norm_rows("head.layernorm", "pool.ln")
                + READ.mlp_rows(upstream.head.mlp, "head.mlp", "pool.mlp", MLP)
            )
        patch = spec.embed.patch
        return WeightMap.parse(rows, p=patch[0], q=patch[1])

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, ModelSpec)
        flat = upstream.is_a(SIGLIP2)
        rows = (
            f"""
            embeddings.patch_embedding  ->  hook_embed  {"" if flat else ": b d r c -> b (r c) d"}
            embeddings                  ->  hook_full_embed
            """
            + norm_hooks("post_layernorm", "ln_final", "hook_ln_final")
            + BLOCKS_HOOKS
        )
        pool = spec.pool.attn
        if pool is None:
            return HookMap.parse(rows + "post_layernorm  ->  hook_logits\n", h=spec.blocks[0].attn.n_heads)
        rows += mha_hooks("head.attention", "pool.attn", width="e")
        rows += READ.mlp_hooks(upstream.head.mlp, "head.mlp", "pool.mlp", MLP)
        rows += """
            head.attention      ->  pool.hook_attn_out
            head.layernorm      ->  pool.ln.hook_normalized
            head.mlp            ->  pool.hook_mlp_out
            head                ->  hook_pooled
            head                ->  hook_logits
        """
        return HookMap.parse(rows, h=spec.blocks[0].attn.n_heads, e=pool.d_head)


def _square_patches(embed: Reader) -> tuple[EmbedSpec, int]:
    spec = patches(embed.patch_embedding, interpolation=BICUBIC)
    side = embed.image_size // spec.patch[0]
    if side * side != embed.num_patches:
        raise embed.unsupported(f"{embed.num_patches} patches of an image that is not square")
    return spec, side


def _flat_patches(embed: Reader) -> tuple[EmbedSpec, int]:
    """Return the facts of an embedding that is handed patches, each as ``[row column channel]`` in one."""
    patch, side = embed.patch_size, embed.position_embedding_size
    channels = linear(embed.patch_embedding).in_features // patch**2
    if side * side != embed.num_patches:
        raise embed.unsupported(f"{embed.num_patches} positions that are not square")
    return EmbedSpec(patch=(patch, patch), in_channels=channels, interpolation=_resizing(embed)), side


@torch.no_grad()
def _resizing(embed: Reader) -> Interpolation:
    """Return how an embedding resizes positions: whose numbers come out, to the bit where there is one.

    Releases of transformers differ in the rounding alone.

    Raises:
        UnsupportedArchitecture: other numbers come out than those of bilinear interpolation.
    """
    native, size = (3, 3), (2, 5)  # fewer rows, where antialiasing shows, and more columns
    rows = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    upstream = embed.module.resize_positional_embeddings(rows.view(*native, 8), torch.tensor([size]), 10)[0]
    apart = {how: float((resize_positions(rows, how, native, size) - upstream).abs().max()) for how in BILINEAR}
    nearest = min(apart, key=apart.__getitem__)
    if apart[nearest] > 1e-5:
        raise embed.unsupported(f"positions resized otherwise than bilinear, by {apart[nearest]:.1e}")
    return nearest


def _attention_pool(head: Reader) -> PoolSpec:
    return PoolSpec(
        kind="attention",
        attn=mha(head.attention),
        mlp=READ.mlp(head.mlp, MLP),
        norm=norm(head.layernorm),
    )


class ClipText(Tower):
    """Causal; the end of the text is read."""

    types = models(
        "clip.modeling_clip.CLIPTextModel",
        "metaclip_2.modeling_metaclip_2.MetaClip2TextModel",
    )

    def spec(self, upstream: Reader) -> TextSpec:
        # CLIP's first configurations name an end of text that is none; transformers then looks for the largest id.
        largest = upstream.eos_token_id == 2 and upstream.is_a(*models("clip.modeling_clip.CLIPTextModel"))
        pool = TextPoolSpec(kind="argmax") if largest else TextPoolSpec(kind="eos", eos_id=upstream.eos_token_id)
        return _text(upstream, pool, causal=True, n_classes=None)

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        return WeightMap.parse(_text_rows(upstream))

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, TextSpec)
        return HookMap.parse(TEXT_HOOKS, h=spec.blocks[0].attn.n_heads)


class SiglipText(Tower):
    """Looks both ways; the last token is read, whatever it is, and projected."""

    types = models(
        "siglip.modeling_siglip.SiglipTextModel",
        "siglip2.modeling_siglip2.Siglip2TextModel",
    )

    def spec(self, upstream: Reader) -> TextSpec:
        pool = TextPoolSpec(kind="last")
        return _text(upstream, pool, causal=False, n_classes=linear(upstream.head).out_features)

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        return WeightMap.parse(_text_rows(upstream) + linear_rows("head", "head"))

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, TextSpec)
        rows = """
            head : in  ->  hook_pooled
            head       ->  hook_logits
        """
        return HookMap.parse(TEXT_HOOKS + rows, h=spec.blocks[0].attn.n_heads)


def _text(upstream: Reader, pool: TextPoolSpec, *, causal: bool, n_classes: int | None) -> TextSpec:
    tokens = READ.embedding(upstream.embeddings.token_embedding)
    positions = READ.positions(upstream.embeddings, "position_embedding")
    return TextSpec(
        d_model=tokens.embedding_dim,
        n_vocab=tokens.num_embeddings,
        n_ctx=positions.num_embeddings,
        causal=causal,
        blocks=blocks(upstream.encoder, causal=causal),
        ln_final=norm(upstream.final_layer_norm),
        pool=pool,
        n_classes=n_classes,
    )


def _text_rows(upstream: Reader) -> str:
    return (
        """
        embeddings.token_embedding.weight     ->  embed.W_E
        embeddings.position_embedding.weight  ->  embed.pos_embed
        ignore embeddings.position_ids        :   positions counted from 0
        """
        + norm_rows("final_layer_norm", "ln_final")
        + blocks_rows(upstream.encoder)
    )


TEXT_HOOKS = (
    """
    embeddings.token_embedding  ->  hook_embed
    embeddings                  ->  hook_full_embed
    """
    + norm_hooks("final_layer_norm", "ln_final", "hook_ln_final")
    + BLOCKS_HOOKS
)

TOWERS: tuple[Tower, ...] = (ClipVision(), SiglipVision(), ClipText(), SiglipText(), ChineseText(), AltText())
