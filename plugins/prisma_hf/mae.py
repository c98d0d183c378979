"""ViT-MAE with its decoder: upstream's own module, hooked where it stands."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from prisma_core.plugin import HookMap, MapAdapter, MapSpec, Reader, masks_as_built, score_rows
from prisma_hf.canonical import parts

PRETRAINING = "transformers.models.vit_mae.modeling_vit_mae.ViTMAEForPreTraining"
STREAM, SQUARE = "batch pos d_model", "batch head query_pos key_pos"
HEADS = "batch pos (head d_head) -> batch pos head d_head"


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
    The encoder's ``pos`` is in upstream's shuffled order; the decoder's is the image's.
    """

    types = (PRETRAINING, "prisma_hf.mae.InOrder")

    def spec(self, upstream: Reader) -> MapSpec:
        mae = _mae(upstream)
        for layer in (*mae.vit.layers, *mae.decoder.decoder_layers):
            masks_as_built(
                layer.attention
            )  # the fused kernel alone obeys it, so an opened one would show another model
        patches = mae.vit.embeddings.patch_embeddings
        relative = (
            mae.module.config.norm_pix_loss
        )  # then pixels are those of each patch less its mean, over its deviation
        pixels = None if relative else tuple(patches.patch_size)
        return MapSpec(shape=(patches.num_channels, *patches.image_size), pixels=pixels)

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        mae, at, fused = _mae(upstream), _at(upstream), _fused(upstream)
        patches = f"{at}vit.embeddings.patch_embeddings"
        rows = f"""
            {patches}       ->  hook_embed       : batch patch d_model  = {patches}(input)
            {at}vit.embeddings  ->  hook_full_embed  : {STREAM}  = the tokens that are not hidden, with positions
        """
        for index in range(len(mae.vit.layers)):
            rows += _layer(f"{at}vit.layers.{index}", f"blocks.{index}", "" if index else "full_embed", fused=fused)
        last = f"blocks.{len(mae.vit.layers) - 1}.resid_post"
        rows += f"""
            {at}vit.layernorm          ->  hook_ln_final       : {STREAM}  = {at}vit.layernorm({last})
            {at}decoder.decoder_embed  ->  decoder.hook_embed  : {STREAM}  = {at}decoder.decoder_embed(hook_ln_final)
        """
        for index in range(len(mae.decoder.decoder_layers)):
            layer = _layer(f"{at}decoder.decoder_layers.{index}", f"decoder.blocks.{index}", "", fused=fused)
            rows += layer.replace("head d_head", "head2 d_head")
        last = f"blocks.{len(mae.decoder.decoder_layers) - 1}.resid_post"
        rows += f"""
            {at}decoder.decoder_norm  ->  decoder.hook_ln_final  : {STREAM}  = {at}decoder.decoder_norm({last})
            {at}decoder.decoder_pred  ->  decoder.hook_pixels    : batch pos pixel  = {at}decoder.decoder_pred(ln_final)
        """
        heads = mae.vit.layers[0].attention.num_attention_heads
        decoding = mae.decoder.decoder_layers[0].attention.num_attention_heads
        return HookMap.parse(rows, head=heads, head2=decoding)

    def reference_places(self, upstream: Reader) -> HookMap:
        if not _fused(upstream):
            return HookMap((), {})
        mae, at = _mae(upstream), _at(upstream)
        rows = "".join(
            score_rows(f"{at}{path}.{index}.attention", f"{to}.{index}.attn", SQUARE, fused=False)
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


def _mae(upstream: Reader) -> Reader:
    return upstream if upstream.is_a(PRETRAINING) else upstream.mae


def _at(upstream: Reader) -> str:
    return "" if upstream.is_a(PRETRAINING) else "mae."


def _fused(upstream: Reader) -> bool:
    return upstream.module.config._attn_implementation == "sdpa"


def _layer(at: str, to: str, x: str, *, fused: bool) -> str:
    """Write the rows of a block; ``x`` is the formula of what comes to it, where the block before does not say."""
    attn = f"{at}.attention"
    return f"""
        {at} : in             ->  {to}.hook_resid_pre       : {STREAM}{f"  = {x}" if x else ""}
        {at}.layernorm_before ->  {to}.ln1.hook_normalized  : {STREAM}  = {at}.layernorm_before(resid_pre)
        {attn}.q_proj         ->  {to}.attn.hook_q          : {HEADS}  = {attn}.q_proj(ln1.normalized)
        {attn}.k_proj         ->  {to}.attn.hook_k          : {HEADS}  = {attn}.k_proj(ln1.normalized)
        {attn}.v_proj         ->  {to}.attn.hook_v          : {HEADS}  = {attn}.v_proj(ln1.normalized)
        {score_rows(attn, f"{to}.attn", SQUARE, fused=fused, scores=f"q . k * {attn}.scaling")}
        {attn}.o_proj : in    ->  {to}.attn.hook_z          : {HEADS}  = pattern v
        {attn}.o_proj         ->  {to}.hook_attn_out        : {STREAM}  = {attn}.o_proj(attn.z)
        {at} @ add            ->  {to}.hook_resid_mid       : {STREAM}  = resid_pre + attn_out
        {at}.layernorm_after  ->  {to}.ln2.hook_normalized  : {STREAM}  = {at}.layernorm_after(resid_mid)
        {at}.mlp.fc1          ->  {to}.mlp.hook_pre         : batch pos d_mlp  = {at}.mlp.fc1(ln2.normalized)
        {at}.mlp.fc2 : in     ->  {to}.mlp.hook_post        : batch pos d_mlp  = {at}.mlp.activation_fn(pre)
        {at}.mlp              ->  {to}.hook_mlp_out         : {STREAM}  = {at}.mlp.fc2(mlp.post)
        {at}                  ->  {to}.hook_resid_post      : {STREAM}  = resid_mid + mlp_out
    """
