"""transformers' TimeSformer, hooked where it stands: attention over time, then over space, in one block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prisma_core.plugin import HookMap, MapAdapter, MapSpec, Reader, TokenLayout, VideoPreprocess, score_rows
from prisma_vivit import parts
from prisma_vivit.hooked.mapping import Acts, Equation, how
from prisma_vivit.processing import preprocess_of

MODEL = "transformers.models.timesformer.modeling_timesformer.TimesformerModel"
CLASSIFIER = "transformers.models.timesformer.modeling_timesformer.TimesformerForVideoClassification"
STREAM = "batch pos d_model"


class TimesformerAdapter(MapAdapter):
    """TimesformerModel and TimesformerForVideoClassification, their three kinds of attention.

    Divided attention: ``blocks.{l}.time`` looks from each patch along its frames, ``blocks.{l}.space`` from the class
    token and each patch of a frame at those. Joint attention, and attention in space alone: ``blocks.{l}.attn``.
    The stream holds the class token, then patch by patch its frames.
    """

    types = (MODEL, CLASSIFIER)

    def spec(self, upstream: Reader) -> MapSpec:
        patches, config = _base(upstream).embeddings.patch_embeddings, _base(upstream).module.config
        classes = parts.classes(upstream.classifier) if upstream.is_a(CLASSIFIER) else None
        shape = (config.num_frames, patches.projection.in_channels, *patches.image_size)
        rows, columns = (side // part for side, part in zip(patches.image_size, patches.patch_size, strict=True))
        layout = TokenLayout(cls=1, frames=config.num_frames, rows=rows, columns=columns, order="row column frame")
        return MapSpec(shape=shape, layout=layout, n_classes=classes)

    def hooks(self, upstream: Reader, spec: MapSpec) -> HookMap:
        base, at = _base(upstream), "timesformer." if upstream.is_a(CLASSIFIER) else ""
        # Attention in space alone takes frames for a larger batch, and never brings them together.
        lead = "(batch frame)" if base.embeddings.attention_type == "space_only" else "batch"
        stream, embed = how(lead, "pos d_model"), f"{at}embeddings.patch_embeddings(input)"
        rows = f"""
            {at}embeddings.patch_embeddings  ->  hook_embed  : {how("(batch frame)", "patch d_model")}  = {embed}
            {at}embeddings  ->  hook_full_embed  : {stream}  = class token and embed, with positions
        """
        for index, layer in enumerate(base.encoder.layer):
            block = _divided if layer.attention_type == "divided_space_time" else _plain
            rows += block(f"{at}encoder.layer.{index}", f"blocks.{index}", lead, "" if index else "  = full_embed")
        last = f"blocks.{len(base.encoder.layer) - 1}.resid_post"
        rows += f"{at}layernorm  ->  hook_ln_final  : {stream}  = {at}layernorm({last})\n"
        if upstream.is_a(CLASSIFIER):
            batch = "batch" if lead == "batch" else "batch_frame"
            rows += f"""
                classifier : in  ->  hook_pooled  : {how(lead, "d_model")}  = first(ln_final)
                classifier       ->  hook_logits  : {batch} class  = classifier(pooled)
            """
        heads = base.encoder.layer[0].attention.attention.num_heads
        return HookMap.parse(rows, head=heads, frame=base.module.config.num_frames)

    def preprocess(self, upstream: Reader, processor: Any) -> VideoPreprocess:
        return preprocess_of(processor, self.spec(upstream).shape[0])

    def output(self, result: Any) -> Tensor:
        return result.logits if hasattr(result, "logits") else result.last_hidden_state

    def equations(self, upstream: Reader, acts: Acts) -> Iterator[Equation]:
        for index, layer in enumerate(_base(upstream).encoder.layer):
            if layer.attention_type == "divided_space_time":
                yield from _divided_equations(f"blocks.{index}", layer, acts)


def _base(upstream: Reader) -> Reader:
    return upstream.timesformer if upstream.is_a(CLASSIFIER) else upstream


def _qkv(source: str, target: str, axes: str) -> str:
    return "".join(
        f"{source} @ getitem#{number}  ->  {target}.hook_{name}  : {axes}  = x W_{name.upper()} + b_{name.upper()}\n"
        for number, name in enumerate("qkv")
    )


def _mlp(at: str, to: str, lead: str) -> str:
    stream, inner = how(lead, "pos d_model"), how(lead, "pos d_mlp")
    return f"""
        {at}.layernorm_after     ->  {to}.ln2.hook_normalized  : {stream}  = {at}.layernorm_after(resid_mid)
        {at}.intermediate.dense  ->  {to}.mlp.hook_pre         : {inner}  = {at}.intermediate.dense(ln2.normalized)
        {at}.output : in         ->  {to}.mlp.hook_post        : {inner}  = {at}.intermediate.intermediate_act_fn(pre)
        {at}.output              ->  {to}.hook_mlp_out         : {stream}  = {at}.output(mlp.post)
        {at}                     ->  {to}.hook_resid_post      : {stream}  = resid_mid + mlp_out
    """


def _plain(at: str, to: str, lead: str, x: str) -> str:
    """Write the rows of a block; ``x`` is the equation of what comes to it, where the block before does not say."""
    stream, z = how(lead, "pos d_model"), how(lead, "pos (head d_head)", "pos head d_head")
    source, square = f"{at}.attention.attention", how(lead, "head query_pos key_pos")
    return f"""
        {at} : in              ->  {to}.hook_resid_pre       : {stream}{x}
        {at}.layernorm_before  ->  {to}.ln1.hook_normalized  : {stream}  = {at}.layernorm_before(resid_pre)
        {_qkv(source, f"{to}.attn", how(lead, "head pos d_head", "pos head d_head"))}
        {score_rows(source, f"{to}.attn", square, fused=False, scores=f"q . k * {source}.scale")}
        {at}.attention.output : in  ->  {to}.attn.hook_z     : {z}  = pattern v
        {at}.attention         ->  {to}.hook_attn_out        : {stream}  = {at}.attention.output(attn.z)
        {at} @ add             ->  {to}.hook_resid_mid       : {stream}  = resid_pre + attn_out
    """ + _mlp(at, to, lead)


def _divided(at: str, to: str, lead: str, x: str) -> str:
    tokens = "batch (patch frame) d_model -> batch patch frame d_model"
    cls = "the class token of resid_pre"
    return f"""
        {at} : in            ->  {to}.hook_resid_pre   : {STREAM}{x}
        {_part(f"{at}.temporal_layernorm", f"{at}.temporal_attention", f"{to}.ln_time", f"{to}.time", "patch", "frame")}
        {at}.temporal_dense  ->  {to}.hook_time_out    : {tokens}  = z W_O + b_O, projected once more
        {at} @ add           ->  {to}.hook_resid_time  : {tokens}  = resid_pre + time_out, of patches
        {_part(f"{at}.layernorm_before", f"{at}.attention", f"{to}.ln1", f"{to}.space", "frame", "pos")}
        {at} @ cat#1         ->  {to}.hook_shortcut    : {STREAM}  = {cls}, and resid_time
        {at} @ cat#2         ->  {to}.hook_attn_out    : {STREAM}  = z W_O + b_O; of class tokens the mean
        {at} @ add#1         ->  {to}.hook_resid_mid   : {STREAM}  = shortcut + attn_out
    """ + _mlp(at, to, lead)


def _part(norm: str, attn: str, ln: str, to: str, over: str, token: str) -> str:
    """Return the rows of one of the two attentions: for each ``over`` from token to token."""
    lead = f"(batch {over})"
    z, square = (
        how(lead, f"{token} (head d_head)", f"{token} head d_head"),
        how(lead, f"head query_{token} key_{token}"),
    )
    return f"""
        {norm}              ->  {ln}.hook_normalized  : {how(lead, f"{token} d_model")}
        {_qkv(f"{attn}.attention", to, how(lead, f"head {token} d_head", f"{token} head d_head"))}
        {score_rows(f"{attn}.attention", to, square, fused=False, scores=f"q . k * {attn}.attention.scale")}
        {attn}.output : in  ->  {to}.hook_z           : {z}  = pattern v
    """


def _divided_equations(at: str, layer: Reader, acts: Acts) -> Iterator[Equation]:
    pre, after = acts[f"{at}.hook_resid_pre"], acts[f"{at}.hook_resid_time"]
    patches = pre[:, 1:].reshape(after.shape)
    normed = layer.temporal_layernorm.module(patches)
    yield f"{at}: ln_time = ln(resid_pre)", acts[f"{at}.ln_time.hook_normalized"], normed
    time, space = layer.temporal_attention, layer.attention
    made = layer.temporal_dense.module(time.output.module(acts[f"{at}.time.hook_z"].flatten(-2)))
    yield f"{at}: time_out = (z W_O + b_O) W + b", acts[f"{at}.hook_time_out"], made
    yield f"{at}: resid_time = resid_pre + time_out", after, patches + acts[f"{at}.hook_time_out"]
    cls = pre[:, :1]
    yield (
        f"{at}: shortcut = class token, resid_time",
        acts[f"{at}.hook_shortcut"],
        torch.cat([cls, after.flatten(1, 2)], 1),
    )
    seen = torch.cat([cls[:, None].expand(-1, after.shape[2], -1, -1), after.transpose(1, 2)], dim=2)
    yield f"{at}: ln1 = ln(each frame)", acts[f"{at}.ln1.hook_normalized"], layer.layernorm_before.module(seen)
    made = space.output.module(acts[f"{at}.space.hook_z"].flatten(-2))
    added = torch.cat([made[:, :, 0].mean(1, keepdim=True), made[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)
    yield f"{at}: attn_out = z W_O + b_O, frames brought together", acts[f"{at}.hook_attn_out"], added
