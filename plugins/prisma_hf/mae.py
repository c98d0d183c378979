"""ViT-MAE with its decoder: upstream's own module, hooked where it stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from prisma_core.plugin import HookMap, MapAdapter, MapSpec, Reader, masks_as_built
from prisma_hf.canonical import parts

PRETRAINING = "transformers.models.vit_mae.modeling_vit_mae.ViTMAEForPreTraining"
STREAM, SQUARE = "batch pos d_model", "batch head query_pos key_pos"
HEADS = "batch pos (head d_head) -> batch pos head d_head"
KERNEL = "scaled_dot_product_attention"


class InOrder(nn.Module):
    """A ``ViTMAEForPreTraining`` whose patches are hidden from the last one on, not at random.

    Args:
        upstream: the model. Its ``config.mask_ratio`` says how many patches are hidden.
    """

    def __init__(self, upstream: nn.Module):
        super().__init__()
        self.mae = upstream
        self.config = upstream.config

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the pixels of each patch ``[batch patch pixel]``.

        Args:
            noise: a number for each patch ``[batch patch]``; those with the largest are hidden. Default: counted.
        """
        if noise is None:
            embeddings: Any = self.mae.vit.embeddings
            noise = torch.arange(embeddings.patch_embeddings.num_patches, device=image.device)
            noise = noise.expand(len(image), -1)
        return self.mae(image, noise=noise).logits


class AutoencoderAdapter(MapAdapter):
    """ViTMAEForPreTraining: ``blocks.{l}`` of the encoder see what is not hidden, ``decoder.blocks.{l}`` all patches.

    Upstream hides and shuffles patches at random at each call; ``noise=`` decides which. ``InOrder`` does not.
    The encoder's ``pos`` is in upstream's shuffled order; the decoder's is the picture's.
    """

    types = (PRETRAINING, "prisma_hf.mae.InOrder")

    def spec(self, upstream: Reader) -> MapSpec:
        mae = _mae(upstream)
        for layer in (*mae.vit.layers, *mae.decoder.decoder_layers):
            masks_as_built(
                layer.attention
            )  # the fused kernel alone obeys it, so an opened one would show another model
        patches = mae.vit.embeddings.patch_embeddings
        return MapSpec(shape=(patches.num_channels, *patches.image_size))

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        mae, at, fused = _mae(upstream), _at(upstream), _fused(upstream)
        rows = f"""
            {at}vit.embeddings.patch_embeddings  ->  hook_embed  : batch patch d_model  = the patches, projected
            {at}vit.embeddings                   ->  hook_full_embed  : {STREAM}  = what is not hidden, with positions
        """
        for index in range(len(mae.vit.layers)):
            rows += _layer(f"{at}vit.layers.{index}", f"blocks.{index}", fused=fused)
        rows += f"""
            {at}vit.layernorm          ->  hook_ln_final       : {STREAM}  = ln_final(resid_post of the last block)
            {at}decoder.decoder_embed  ->  decoder.hook_embed  : {STREAM}  = ln_final W + b
        """
        for index in range(len(mae.decoder.decoder_layers)):
            layer = _layer(f"{at}decoder.decoder_layers.{index}", f"decoder.blocks.{index}", fused=fused)
            rows += layer.replace("head d_head", "dechead d_head")
        rows += f"""
            {at}decoder.decoder_norm  ->  decoder.hook_ln_final  : {STREAM}  = ln(resid_post of the last block)
            {at}decoder.decoder_pred  ->  decoder.hook_pixels    : batch pos pixel  = ln_final W + b
        """
        heads = next(iter(mae.vit.layers)).attention.num_attention_heads
        decoding = next(iter(mae.decoder.decoder_layers)).attention.num_attention_heads
        return HookMap.parse(rows, head=heads, dechead=decoding)

    def reference_places(self, upstream: Reader) -> HookMap:
        if not _fused(upstream):
            return HookMap((), {})
        mae, at = _mae(upstream), _at(upstream)
        rows = "".join(
            _square(f"{at}{path}.{index}.attention", f"{to}.{index}.attn", fused=False)
            for path, to, layers in (
                ("vit.layers", "blocks", mae.vit.layers),
                ("decoder.decoder_layers", "decoder.blocks", mae.decoder.decoder_layers),
            )
            for index in range(len(layers))
        )
        return HookMap.parse(rows)

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return parts.explicit_attention(upstream)

    def output(self, result: Any) -> Tensor:
        return result if isinstance(result, Tensor) else result.logits

    def equations(self, upstream: Reader, acts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        mae = _mae(upstream)
        yield from _equations("blocks", mae.vit.layers, acts)
        yield from _equations("decoder.blocks", mae.decoder.decoder_layers, acts)
        last = acts[f"blocks.{len(mae.vit.layers) - 1}.hook_resid_post"]
        yield "hook_ln_final = ln(the last resid_post)", acts["hook_ln_final"], mae.vit.layernorm.module(last)
        embedded = mae.decoder.decoder_embed.module(acts["hook_ln_final"])
        yield "decoder.hook_embed = ln_final W + b", acts["decoder.hook_embed"], embedded
        last = acts[f"decoder.blocks.{len(mae.decoder.decoder_layers) - 1}.hook_resid_post"]
        normed = acts["decoder.hook_ln_final"]
        yield "decoder.hook_ln_final = ln(the last resid_post)", normed, mae.decoder.decoder_norm.module(last)
        yield (
            "decoder.hook_pixels = ln_final W + b",
            acts["decoder.hook_pixels"],
            mae.decoder.decoder_pred.module(normed),
        )


def _mae(upstream: Reader) -> Reader:
    return upstream if upstream.is_a(PRETRAINING) else upstream.mae


def _at(upstream: Reader) -> str:
    return "" if upstream.is_a(PRETRAINING) else "mae."


def _fused(upstream: Reader) -> bool:
    return upstream.module.config._attn_implementation == "sdpa"


def _square(source: str, target: str, *, fused: bool) -> str:
    scores, pattern = f"{source} @ softmax : in", f"{source} @ softmax"
    if fused:
        scores, pattern = f"{source} @ {KERNEL} : scores", f"{source} @ {KERNEL} : pattern"
    return f"""
        {scores}   ->  {target}.hook_attn_scores  : {SQUARE}  = q . k * scale
        {pattern}  ->  {target}.hook_pattern      : {SQUARE}  = softmax(attn_scores)
    """


def _layer(at: str, to: str, *, fused: bool) -> str:
    return f"""
        {at} : in                   ->  {to}.hook_resid_pre       : {STREAM}
        {at}.layernorm_before       ->  {to}.ln1.hook_normalized  : {STREAM}  = ln(resid_pre)
        {at}.attention.q_proj       ->  {to}.attn.hook_q          : {HEADS}
        {at}.attention.k_proj       ->  {to}.attn.hook_k          : {HEADS}
        {at}.attention.v_proj       ->  {to}.attn.hook_v          : {HEADS}
        {_square(f"{at}.attention", f"{to}.attn", fused=fused)}
        {at}.attention.o_proj : in  ->  {to}.attn.hook_z          : {HEADS}  = pattern v
        {at}.attention.o_proj       ->  {to}.hook_attn_out        : {STREAM}
        {at} @ add                  ->  {to}.hook_resid_mid       : {STREAM}  = resid_pre + attn_out
        {at}.layernorm_after        ->  {to}.ln2.hook_normalized  : {STREAM}  = ln(resid_mid)
        {at}.mlp.fc1                ->  {to}.mlp.hook_pre         : batch pos d_mlp
        {at}.mlp.fc2 : in           ->  {to}.mlp.hook_post        : batch pos d_mlp  = act(pre)
        {at}.mlp                    ->  {to}.hook_mlp_out         : {STREAM}
        {at}                        ->  {to}.hook_resid_post      : {STREAM}  = resid_mid + mlp_out
    """


def _equations(at: str, layers: Reader, acts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for index, layer in enumerate(layers):
        here, attn, mlp = f"{at}.{index}", layer.attention, layer.mlp
        one, two = acts[f"{here}.ln1.hook_normalized"], acts[f"{here}.ln2.hook_normalized"]
        yield f"{here}: ln1 = ln(resid_pre)", one, layer.layernorm_before.module(acts[f"{here}.hook_resid_pre"])
        yield f"{here}: ln2 = ln(resid_mid)", two, layer.layernorm_after.module(acts[f"{here}.hook_resid_mid"])
        for name in "qkv":
            made = getattr(attn, f"{name}_proj").module(one)
            yield f"{here}: {name} = ln1 W + b", acts[f"{here}.attn.hook_{name}"].flatten(-2), made
        q, k = (acts[f"{here}.attn.hook_{name}"] for name in "qk")
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * attn.scaling
        yield f"{here}: scores = q . k * scale", acts[f"{here}.attn.hook_attn_scores"], scores
        out = attn.o_proj.module(acts[f"{here}.attn.hook_z"].flatten(-2))
        yield f"{here}: attn_out = z W_O + b_O", acts[f"{here}.hook_attn_out"], out
        yield f"{here}: pre = ln2 W_in + b_in", acts[f"{here}.mlp.hook_pre"], mlp.fc1.module(two)
        post = mlp.activation_fn.module(acts[f"{here}.mlp.hook_pre"])
        yield f"{here}: post = act(pre)", acts[f"{here}.mlp.hook_post"], post
        yield (
            f"{here}: mlp_out = post W_out + b_out",
            acts[f"{here}.hook_mlp_out"],
            mlp.fc2.module(acts[f"{here}.mlp.hook_post"]),
        )
