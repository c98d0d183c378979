"""transformers' V-JEPA 2, hooked where it stands: its predictor, and its classifier with an attentive pooler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from prisma_core.plugin import HookMap, MapAdapter, MapSpec, Reader, TokenLayout, VideoPreprocess, eager_attention
from prisma_vivit import parts
from prisma_vivit.hooked.mapping import Acts, Claim, how, square_rows
from prisma_vivit.hooked.vjepa2_equations import layers_equations, query_equations, turned_equations
from prisma_vivit.processing import preprocess_of

CLASSIFIER = "transformers.models.vjepa2.modeling_vjepa2.VJEPA2ForVideoClassification"
PREDICTOR = "transformers.models.vjepa2.modeling_vjepa2.VJEPA2Predictor"
SQUARE, QUERY_SQUARE = "batch head query_pos key_pos", "batch head query key_pos"
STREAM, PATCHES, HEADS = (
    "batch pos d_model",
    "batch patch d_model",
    how("batch", "pos (head d_head)", "pos head d_head"),
)


class Predictor(nn.Module):
    """V-JEPA 2's predictor as ``VJEPA2Model`` calls it when it is told nothing: every token is seen and predicted.

    Args:
        upstream: a ``VJEPA2Model``, whose predictor it is, or a ``VJEPA2Predictor``.
    """

    def __init__(self, upstream: nn.Module):
        super().__init__()
        self.predictor = cast(nn.Module, getattr(upstream, "predictor", upstream))

    def forward(
        self,
        encoded: Tensor,
        context_mask: list[Tensor] | None = None,
        target_mask: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the predicted tokens ``[batch target d_encoder]``.

        Args:
            encoded: what the encoder makes of a video: ``[batch pos d_encoder]``.
            context_mask, target_mask: positions ``[batch n]`` that are seen, and that are to be predicted; all if None.
        """
        every = [torch.arange(encoded.shape[1], device=encoded.device).expand(len(encoded), -1)]
        masks = {"context_mask": context_mask or every, "target_mask": target_mask or every}
        return self.predictor(encoder_hidden_states=encoded, **masks).last_hidden_state


class VJEPA2PredictorAdapter(MapAdapter):
    """The predictor: tokens that are seen and tokens to be predicted, sorted by position.

    ``pos`` counts both: where a position is seen and predicted, it is there twice. ``patch`` counts those of one kind.
    """

    types = (PREDICTOR, "prisma_vivit.hooked.vjepa2_maps.Predictor")

    def spec(self, upstream: Reader) -> MapSpec:
        config = _predictor(upstream).module.config
        layout = _layout(config)
        shape = (layout.n_tokens, _predictor(upstream).embeddings.predictor_embeddings.in_features)
        return MapSpec(shape=shape, layout=layout)

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        predictor, at = _predictor(upstream), "" if upstream.is_a(PREDICTOR) else "predictor."
        rows = f"""
            {at}embeddings.predictor_embeddings  ->  hook_embed       : {PATCHES}  = tokens that are seen, projected
            {at}embeddings                       ->  hook_full_embed  : {STREAM}  = tokens that are seen, mask tokens
        """
        for index in range(len(predictor.layer)):
            rows += _layer(f"{at}layer.{index}", f"blocks.{index}", fused=_fused(predictor))
        rows += f"""
            {at}layernorm  ->  hook_ln_final  : {STREAM}  = ln_final(resid_post of the last block)
            {at}proj : in  ->  hook_pooled    : {PATCHES}  = the tokens to be predicted
            {at}proj       ->  hook_logits    : {PATCHES}  = pooled W + b
        """
        return HookMap.parse(rows, head=_heads(predictor))

    def reference_places(self, upstream: Reader) -> HookMap:
        predictor, at = _predictor(upstream), "" if upstream.is_a(PREDICTOR) else "predictor."
        return HookMap.parse(_elsewhere_rows(predictor, f"{at}layer")) if _fused(predictor) else HookMap((), {})

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager_attention(upstream)

    def output(self, result: Any) -> Tensor:
        return result if isinstance(result, Tensor) else result.last_hidden_state

    def equations(self, upstream: Reader, acts: Acts) -> Iterator[Claim]:
        predictor = _predictor(upstream)
        yield from layers_equations("blocks", predictor.layer, acts)
        yield from turned_equations(predictor.layer, acts, twice=True)
        last = acts[f"blocks.{len(predictor.layer) - 1}.hook_resid_post"]
        yield "hook_ln_final = ln(the last resid_post)", acts["hook_ln_final"], predictor.layernorm.module(last)
        yield "hook_logits = pooled W + b", acts["hook_logits"], predictor.proj.module(acts["hook_pooled"])


class VJEPA2ClassifierAdapter(MapAdapter):
    """VJEPA2ForVideoClassification: the encoder, and a pooler of further blocks and one query that reads all tokens.

    ``pool.blocks.{l}`` are the pooler's own blocks, which know no positions; ``pool.attn`` is what the query reads.
    """

    types = (CLASSIFIER,)

    def spec(self, upstream: Reader) -> MapSpec:
        config, proj = upstream.module.config, upstream.vjepa2.encoder.embeddings.patch_embeddings.proj
        frames, side, patch = config.frames_per_clip, config.crop_size, config.patch_size
        return MapSpec(
            shape=(frames, proj.in_channels, side, side),
            sizes=((frames, proj.in_channels, side + patch, side + 2 * patch), (frames, proj.in_channels, side, patch)),
            layout=_layout(config),
            n_classes=parts.classes(upstream.classifier),
        )

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        encoder, at, fused = upstream.vjepa2.encoder, "vjepa2.encoder", _fused(upstream)
        rows = f"{at}.embeddings  ->  hook_embed  : {PATCHES}  = the patches, projected\n"
        for index in range(len(encoder.layer)):
            rows += _layer(f"{at}.layer.{index}", f"blocks.{index}", fused=fused)
        rows += f"{at}.layernorm  ->  hook_ln_final  : {STREAM}  = ln_final(resid_post of the last block)\n"
        for index in range(len(upstream.pooler.self_attention_layers)):
            rows += _pool_layer(f"pooler.self_attention_layers.{index}", f"pool.blocks.{index}", fused=fused)
        rows += _query("pooler.cross_attention_layer", fused=fused)
        rows += """
            classifier : in  ->  hook_pooled  : batch d_model
            classifier       ->  hook_logits  : batch class
        """
        return HookMap.parse(rows, head=_heads(encoder))

    def reference_places(self, upstream: Reader) -> HookMap:
        if not _fused(upstream):
            return HookMap((), {})
        rows = square_rows("pooler.cross_attention_layer.cross_attn", "pool.attn", QUERY_SQUARE, fused=False)
        for index in range(len(upstream.pooler.self_attention_layers)):
            at, to = f"pooler.self_attention_layers.{index}.self_attn", f"pool.blocks.{index}.attn"
            rows += square_rows(at, to, SQUARE, fused=False)
        return HookMap.parse(rows + _elsewhere_rows(upstream.vjepa2.encoder, "vjepa2.encoder.layer"))

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager_attention(upstream)

    def preprocess(self, upstream: Reader, processor: Any) -> VideoPreprocess:
        return preprocess_of(processor, self.spec(upstream).shape[0])

    def output(self, result: Any) -> Tensor:
        return result.logits

    def equations(self, upstream: Reader, acts: Acts) -> Iterator[Claim]:
        encoder, pooler = upstream.vjepa2.encoder, upstream.pooler
        yield from layers_equations("blocks", encoder.layer, acts)
        yield from turned_equations(encoder.layer, acts, twice=False)
        last = acts[f"blocks.{len(encoder.layer) - 1}.hook_resid_post"]
        yield "hook_ln_final = ln(the last resid_post)", acts["hook_ln_final"], encoder.layernorm.module(last)
        yield from layers_equations("pool.blocks", pooler.self_attention_layers, acts)
        yield from query_equations(pooler, acts)


def _layout(config: Any) -> TokenLayout:
    side = config.crop_size // config.patch_size
    return TokenLayout(frames=config.frames_per_clip // config.tubelet_size, rows=side, columns=side)


def _predictor(upstream: Reader) -> Reader:
    return upstream if upstream.is_a(PREDICTOR) else upstream.predictor


def _heads(holder: Reader) -> int:
    return next(iter(holder.layer)).attention.num_attention_heads


def _fused(holder: Reader) -> bool:
    return holder.module.config._attn_implementation == "sdpa"


# -------------------------------------------------------------------- rows


def _layer(at: str, to: str, *, fused: bool) -> str:
    turned = how("batch", "head pos d_head", "pos head d_head")
    return f"""
        {at} : in                ->  {to}.hook_resid_pre       : {STREAM}
        {at}.norm1               ->  {to}.ln1.hook_normalized  : {STREAM}  = ln(resid_pre)
        {at}.attention.query     ->  {to}.attn.hook_q          : {HEADS}
        {at}.attention.key       ->  {to}.attn.hook_k          : {HEADS}
        {at}.attention.value     ->  {to}.attn.hook_v          : {HEADS}
        {at}.attention @ cat     ->  {to}.attn.hook_rot_k      : {turned}  = k turned by its position
        {at}.attention @ cat#1   ->  {to}.attn.hook_rot_q      : {turned}  = q turned by its position
        {square_rows(f"{at}.attention", f"{to}.attn", SQUARE, fused=fused)}
        {at}.attention.proj : in ->  {to}.attn.hook_z          : {HEADS}  = pattern v
        {at}.attention           ->  {to}.hook_attn_out        : {STREAM}
        {at} @ add               ->  {to}.hook_resid_mid       : {STREAM}  = resid_pre + attn_out
        {at}.norm2               ->  {to}.ln2.hook_normalized  : {STREAM}  = ln(resid_mid)
        {_mlp(at, to, "pos")}
        {at}                     ->  {to}.hook_resid_post      : {STREAM}  = resid_mid + mlp_out
    """


def _mlp(at: str, to: str, token: str) -> str:
    return f"""
        {at}.mlp.fc1             ->  {to}.mlp.hook_pre         : batch {token} d_mlp
        {at}.mlp.fc2 : in        ->  {to}.mlp.hook_post        : batch {token} d_mlp  = act(pre)
        {at}.mlp                 ->  {to}.hook_mlp_out         : batch {token} d_model
    """


def _pool_layer(at: str, to: str, *, fused: bool) -> str:
    return f"""
        {at} : in                    ->  {to}.hook_resid_pre       : {STREAM}
        {at}.layer_norm1             ->  {to}.ln1.hook_normalized  : {STREAM}  = ln(resid_pre)
        {at}.self_attn.q_proj        ->  {to}.attn.hook_q          : {HEADS}
        {at}.self_attn.k_proj        ->  {to}.attn.hook_k          : {HEADS}
        {at}.self_attn.v_proj        ->  {to}.attn.hook_v          : {HEADS}
        {square_rows(f"{at}.self_attn", f"{to}.attn", SQUARE, fused=fused)}
        {at}.self_attn.out_proj : in ->  {to}.attn.hook_z          : {HEADS}  = pattern v
        {at}.self_attn.out_proj      ->  {to}.hook_attn_out        : {STREAM}
        {at} @ add                   ->  {to}.hook_resid_mid       : {STREAM}  = resid_pre + attn_out
        {at}.layer_norm2             ->  {to}.ln2.hook_normalized  : {STREAM}  = ln(resid_mid)
        {_mlp(at, to, "pos")}
        {at}                         ->  {to}.hook_resid_post      : {STREAM}  = resid_mid + mlp_out
    """


def _query(at: str, *, fused: bool) -> str:
    to, one = "pool", "batch query d_model"
    z = "batch query (head d_head) -> batch query head d_head"
    return f"""
        {at} : in                ->  {to}.hook_query           : {one}  = the learned query
        {at}.layer_norm1         ->  {to}.ln1.hook_normalized  : {STREAM}  = ln(the last resid_post)
        {at}.cross_attn.q_proj   ->  {to}.attn.hook_q          : {z}
        {at}.cross_attn.k_proj   ->  {to}.attn.hook_k          : {HEADS}
        {at}.cross_attn.v_proj   ->  {to}.attn.hook_v          : {HEADS}
        {square_rows(f"{at}.cross_attn", f"{to}.attn", QUERY_SQUARE, fused=fused)}
        {at}.cross_attn          ->  {to}.attn.hook_z          : {z}  = pattern v
        {at} @ add               ->  {to}.hook_resid_mid       : {one}  = query + z
        {at}.layer_norm2         ->  {to}.ln2.hook_normalized  : {one}  = ln(resid_mid)
        {_mlp(at, to, "query")}
        {at}                     ->  {to}.hook_resid_post      : {one}  = resid_mid + mlp_out
    """


def _elsewhere_rows(holder: Reader, at: str) -> str:
    """Return where patterns are once upstream computes attention step by step."""
    return "\n".join(
        square_rows(f"{at}.{index}.attention", f"blocks.{index}.attn", SQUARE, fused=False)
        for index in range(len(holder.layer))
    )
