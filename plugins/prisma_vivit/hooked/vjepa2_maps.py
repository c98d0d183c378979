"""transformers' V-JEPA 2, hooked where it stands: its predictor, and its classifier with an attentive pooler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from prisma_core.plugin import (
    HookMap,
    MapAdapter,
    MapSpec,
    Reader,
    TokenLayout,
    VideoPreprocess,
    eager_attention,
    score_rows,
)
from prisma_vivit import parts
from prisma_vivit.hooked.mapping import Acts, Equation, how, mlp_rows
from prisma_vivit.hooked.vjepa2_equations import rotary_equations, token_equations
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
        layout = _layout(_predictor(upstream))
        shape = (layout.n_tokens, _predictor(upstream).embeddings.predictor_embeddings.in_features)
        return MapSpec(shape=shape, layout=layout)

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        predictor, at = _predictor(upstream), "" if upstream.is_a(PREDICTOR) else "predictor."
        rows = f"""
            {at}embeddings.predictor_embeddings  ->  hook_embed : {PATCHES} = {at}embeddings.predictor_embeddings(input)
            {at}embeddings  ->  hook_full_embed  : {STREAM}  = embed, then mask tokens
        """
        for index in range(len(predictor.layer)):
            rows += _layer(f"{at}layer.{index}", f"blocks.{index}", fused=_fused(predictor))
        last = f"blocks.{len(predictor.layer) - 1}.resid_post"
        rows += f"""
            {at}layernorm  ->  hook_ln_final  : {STREAM}  = {at}layernorm({last})
            {at}proj : in  ->  hook_pooled    : {PATCHES}  = the tokens to be predicted
            {at}proj       ->  hook_logits    : {PATCHES}  = {at}proj(pooled)
        """
        return HookMap.parse(rows, head=_heads(predictor))

    def reference_places(self, upstream: Reader) -> HookMap:
        predictor, at = _predictor(upstream), "" if upstream.is_a(PREDICTOR) else "predictor."
        return HookMap.parse(_elsewhere_rows(predictor, f"{at}layer")) if _fused(predictor) else HookMap((), {})

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager_attention(upstream)

    def output(self, result: Any) -> Tensor:
        return result if isinstance(result, Tensor) else result.last_hidden_state

    def equations(self, upstream: Reader, acts: Acts) -> Iterator[Equation]:
        predictor = _predictor(upstream)
        yield from token_equations(predictor, acts)
        yield from rotary_equations(predictor.layer, acts, twice=True)


class VJEPA2ClassifierAdapter(MapAdapter):
    """VJEPA2ForVideoClassification: the encoder, and a pooler of further blocks and one query that reads all tokens.

    ``pool.blocks.{l}`` are the pooler's own blocks, which know no positions; ``pool.attn`` is what the query reads.
    """

    types = (CLASSIFIER,)

    def spec(self, upstream: Reader) -> MapSpec:
        config, proj = upstream.module.config, upstream.vjepa2.encoder.embeddings.patch_embeddings.proj
        layout = _layout(upstream)
        frames, side, patch = config.frames_per_clip, config.crop_size, config.patch_size
        return MapSpec(
            shape=(frames, proj.in_channels, side, side),
            sizes=((frames, proj.in_channels, side + patch, side + 2 * patch), (frames, proj.in_channels, side, patch)),
            layout=layout,
            n_classes=parts.classes(upstream.classifier),
        )

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        encoder, at, fused = upstream.vjepa2.encoder, "vjepa2.encoder", _fused(upstream)
        rows = f"{at}.embeddings  ->  hook_embed  : {PATCHES}  = {at}.embeddings(input)\n"
        for index in range(len(encoder.layer)):
            rows += _layer(f"{at}.layer.{index}", f"blocks.{index}", fused=fused)
        last = f"blocks.{len(encoder.layer) - 1}.resid_post"
        rows += f"{at}.layernorm  ->  hook_ln_final  : {STREAM}  = {at}.layernorm({last})\n"
        tokens = "ln_final"
        for index in range(len(upstream.pooler.self_attention_layers)):
            rows += _pool_layer(f"pooler.self_attention_layers.{index}", f"pool.blocks.{index}", fused=fused)
            tokens = f"pool.blocks.{index}.resid_post"
        rows += _query("pooler.cross_attention_layer", tokens, fused=fused)
        rows += """
            classifier : in  ->  hook_pooled  : batch d_model  = first(pool.resid_post)
            classifier       ->  hook_logits  : batch class    = classifier(pooled)
        """
        return HookMap.parse(rows, head=_heads(encoder))

    def reference_places(self, upstream: Reader) -> HookMap:
        if not _fused(upstream):
            return HookMap((), {})
        rows = score_rows("pooler.cross_attention_layer.cross_attn", "pool.attn", QUERY_SQUARE, fused=False)
        for index in range(len(upstream.pooler.self_attention_layers)):
            at, to = f"pooler.self_attention_layers.{index}.self_attn", f"pool.blocks.{index}.attn"
            rows += score_rows(at, to, SQUARE, fused=False)
        return HookMap.parse(rows + _elsewhere_rows(upstream.vjepa2.encoder, "vjepa2.encoder.layer"))

    def unfused_attention(self, upstream: nn.Module) -> AbstractContextManager[None]:
        return eager_attention(upstream)

    def preprocess(self, upstream: Reader, processor: Any) -> VideoPreprocess:
        return preprocess_of(processor, self.spec(upstream).shape[0])

    def output(self, result: Any) -> Tensor:
        return result.logits

    def equations(self, upstream: Reader, acts: Acts) -> Iterator[Equation]:
        yield from rotary_equations(upstream.vjepa2.encoder.layer, acts, twice=False)


def _layout(upstream: Reader) -> TokenLayout:
    config = upstream.module.config
    names = ("frames_per_clip", "tubelet_size", "crop_size", "patch_size")
    if wrong := [f"{name}={size!r}" for name in names if type(size := getattr(config, name)) is not int or size < 1]:
        raise upstream.unsupported(f"a config with {', '.join(wrong)}, where a whole number above 0 is expected")
    side = config.crop_size // config.patch_size
    return TokenLayout(frames=config.frames_per_clip // config.tubelet_size, rows=side, columns=side)


def _predictor(upstream: Reader) -> Reader:
    return upstream if upstream.is_a(PREDICTOR) else upstream.predictor


def _heads(holder: Reader) -> int:
    return holder.layer[0].attention.num_attention_heads


def _fused(holder: Reader) -> bool:
    return holder.module.config._attn_implementation == "sdpa"


# -------------------------------------------------------------------- rows


def _layer(at: str, to: str, *, fused: bool) -> str:
    rotated, attn = how("batch", "head pos d_head", "pos head d_head"), f"{at}.attention"
    return f"""
        {at} : in        ->  {to}.hook_resid_pre       : {STREAM}
        {at}.norm1       ->  {to}.ln1.hook_normalized  : {STREAM}  = {at}.norm1(resid_pre)
        {attn}.query     ->  {to}.attn.hook_q          : {HEADS}  = {attn}.query(ln1.normalized)
        {attn}.key       ->  {to}.attn.hook_k          : {HEADS}  = {attn}.key(ln1.normalized)
        {attn}.value     ->  {to}.attn.hook_v          : {HEADS}  = {attn}.value(ln1.normalized)
        {attn} @ cat     ->  {to}.attn.hook_rot_k      : {rotated}  = k, rotated by its position
        {attn} @ cat#1   ->  {to}.attn.hook_rot_q      : {rotated}  = q, rotated by its position
        {score_rows(attn, f"{to}.attn", SQUARE, fused=fused, scores=f"rot_q . rot_k * {attn}.scaling")}
        {attn}.proj : in ->  {to}.attn.hook_z          : {HEADS}  = pattern v
        {attn}           ->  {to}.hook_attn_out        : {STREAM}  = {attn}.proj(attn.z)
        {at} @ add       ->  {to}.hook_resid_mid       : {STREAM}  = resid_pre + attn_out
        {at}.norm2       ->  {to}.ln2.hook_normalized  : {STREAM}  = {at}.norm2(resid_mid)
        {mlp_rows(f"{at}.mlp", to, "pos", x="ln2.normalized", act=f"{at}.mlp.activation")}
        {at}             ->  {to}.hook_resid_post      : {STREAM}  = resid_mid + mlp_out
    """


def _pool_layer(at: str, to: str, *, fused: bool) -> str:
    attn = f"{at}.self_attn"
    return f"""
        {at} : in            ->  {to}.hook_resid_pre       : {STREAM}
        {at}.layer_norm1     ->  {to}.ln1.hook_normalized  : {STREAM}  = {at}.layer_norm1(resid_pre)
        {attn}.q_proj        ->  {to}.attn.hook_q          : {HEADS}  = {attn}.q_proj(ln1.normalized)
        {attn}.k_proj        ->  {to}.attn.hook_k          : {HEADS}  = {attn}.k_proj(ln1.normalized)
        {attn}.v_proj        ->  {to}.attn.hook_v          : {HEADS}  = {attn}.v_proj(ln1.normalized)
        {score_rows(attn, f"{to}.attn", SQUARE, fused=fused, scores=f"q . k * {attn}.scale")}
        {attn}.out_proj : in ->  {to}.attn.hook_z          : {HEADS}  = pattern v
        {attn}.out_proj      ->  {to}.hook_attn_out        : {STREAM}  = {attn}.out_proj(attn.z)
        {at} @ add           ->  {to}.hook_resid_mid       : {STREAM}  = resid_pre + attn_out
        {at}.layer_norm2     ->  {to}.ln2.hook_normalized  : {STREAM}  = {at}.layer_norm2(resid_mid)
        {mlp_rows(f"{at}.mlp", to, "pos", x="ln2.normalized", act=f"{at}.mlp.activation")}
        {at}                 ->  {to}.hook_resid_post      : {STREAM}  = resid_mid + mlp_out
    """


def _query(at: str, tokens: str, *, fused: bool) -> str:
    """Write the rows of the query that reads ``tokens``, as a formula names them."""
    to, one, attn = "pool", "batch query d_model", f"{at}.cross_attn"
    z = "batch query (head d_head) -> batch query head d_head"
    return f"""
        {at} : in          ->  {to}.hook_query           : {one}  = pooler.query_tokens
        {at}.layer_norm1   ->  {to}.ln1.hook_normalized  : {STREAM}  = {at}.layer_norm1({tokens})
        {attn}.q_proj      ->  {to}.attn.hook_q          : {z}  = {attn}.q_proj(query)
        {attn}.k_proj      ->  {to}.attn.hook_k          : {HEADS}  = {attn}.k_proj(ln1.normalized)
        {attn}.v_proj      ->  {to}.attn.hook_v          : {HEADS}  = {attn}.v_proj(ln1.normalized)
        {score_rows(attn, f"{to}.attn", QUERY_SQUARE, fused=fused, scores=f"q . k * {attn}.scale")}
        {attn}             ->  {to}.attn.hook_z          : {z}  = pattern v
        {at} @ add         ->  {to}.hook_resid_mid       : {one}  = query + attn.z
        {at}.layer_norm2   ->  {to}.ln2.hook_normalized  : {one}  = {at}.layer_norm2(resid_mid)
        {mlp_rows(f"{at}.mlp", to, "query", x="ln2.normalized", act=f"{at}.mlp.activation")}
        {at}               ->  {to}.hook_resid_post      : {one}  = resid_mid + mlp_out
    """


def _elsewhere_rows(holder: Reader, at: str) -> str:
    """Return where patterns are once upstream computes attention step by step."""
    return "\n".join(
        score_rows(f"{at}.{index}.attention", f"blocks.{index}.attn", SQUARE, fused=False)
        for index in range(len(holder.layer))
    )
