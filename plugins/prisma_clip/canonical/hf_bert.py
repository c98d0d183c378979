"""The text towers of ChineseCLIP and AltCLIP: BERT and RoBERTa, which norm the stream itself after each addition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from prisma_clip.canonical.common import READ, linear, norm, norm_hooks
from prisma_clip.canonical.hf_parts import Tower, models
from prisma_core.plugin import (
    AnySpec,
    AttentionSpec,
    BlockSpec,
    HookMap,
    MlpNames,
    MlpSpec,
    Reader,
    TextPoolSpec,
    TextSpec,
    WeightMap,
    linear_rows,
    masks_as_built,
    norm_rows,
)

MLP = MlpNames("intermediate.dense", "output.dense", "intermediate.intermediate_act_fn")

BLOCKS_HOOKS = """
    {at}.attention.self.query : in       ->  blocks.{l}.hook_resid_pre
    {at}.attention.self.query            ->  blocks.{l}.attn.hook_q  : b p (h d) -> b p h d
    {at}.attention.self.key              ->  blocks.{l}.attn.hook_k  : b p (h d) -> b p h d
    {at}.attention.self.value            ->  blocks.{l}.attn.hook_v  : b p (h d) -> b p h d
    {at}.attention.self @ softmax : in   ->  blocks.{l}.attn.hook_attn_scores
    {at}.attention.self @ softmax        ->  blocks.{l}.attn.hook_pattern
    {at}.attention.output.dense : in     ->  blocks.{l}.attn.hook_z  : b p (h d) -> b p h d
    {at}.attention.output.dense          ->  blocks.{l}.hook_attn_out
    {at}.attention.output.LayerNorm : in  ->  blocks.{l}.hook_resid_mid
    {at}.attention.output.LayerNorm      ->  blocks.{l}.ln1.hook_normalized
    {at}.intermediate.dense              ->  blocks.{l}.mlp.hook_pre
    {at}.output.dense : in               ->  blocks.{l}.mlp.hook_post
    {at}.output.dense                    ->  blocks.{l}.hook_mlp_out
    {at}.output.LayerNorm : in           ->  blocks.{l}.hook_resid_post
    {at}.output.LayerNorm                ->  blocks.{l}.ln2.hook_normalized
"""


def block(module: Reader) -> BlockSpec:
    """Return the facts of one of BERT's blocks."""
    attn = module.attention.self
    masks_as_built(attn)
    for part in (attn.query, attn.key, attn.value, module.attention.output.dense):
        linear(part)
    heads = attn.num_attention_heads
    return BlockSpec(
        kind="post",
        attn=AttentionSpec(n_heads=heads, n_kv_heads=heads, d_head=attn.attention_head_size, scale=attn.scaling),
        mlp=READ.mlp(module, MLP),
        ln1=norm(module.attention.output.LayerNorm),
        ln2=norm(module.output.LayerNorm),
    )


def _embedded(embed: Reader, layers: list[Reader]) -> dict[str, object]:
    words, rows = READ.embedding(embed.word_embeddings), READ.positions(embed, "position_embeddings").num_embeddings
    READ.embedding(embed.token_type_embeddings)
    if embed.has("token_type_ids") and embed.token_type_ids.any():
        raise embed.unsupported("token_type_ids other than 0")
    pad = words.padding_idx
    if pad is None:
        raise words.unsupported("no token for padding")
    by_text = _counts_text(embed)
    if by_text:
        embed.expect(padding_idx=pad)
    return {
        "d_model": words.embedding_dim,
        "n_vocab": words.num_embeddings,
        "n_ctx": rows - pad - 1 if by_text else rows,
        "causal": False,
        "pad_id": pad,
        "pos_by_text": by_text,
        "blocks": tuple(block(layer) for layer in layers),
        "ln_pre": norm(embed.LayerNorm),
    }


def _counts_text(embed: Reader) -> bool:
    """Return whether positions leave padding out, as RoBERTa's do."""
    return embed.has("padding_idx")


def _rows(embed: Reader, layer: Reader, embeddings: str, encoder: str) -> WeightMap:
    at, ours = f"{encoder}.{{l}}", "blocks.{l}"
    tables = ", ".join(f"{embeddings}.{kind}_embeddings.weight" for kind in ("position", "token_type"))
    rows = f"""
        {embeddings}.word_embeddings.weight  ->  embed.W_E
        [{tables}]  ->  embed.pos_embed  : {{positions}}
        ignore {embeddings}.position_ids     :   positions counted from 0
        ignore {embeddings}.token_type_ids   :   zeros: all of a text is of the first type
    """
    rows += norm_rows(f"{embeddings}.LayerNorm", "ln_pre")
    attn = layer.attention.self
    rows += READ.qkv_rows(attn, f"{at}.attention.self", f"{ours}.attn.qkv", ("query", "key", "value"))
    rows += linear_rows(f"{at}.attention.output.dense", f"{ours}.attn.out")
    rows += READ.mlp_rows(layer, at, f"{ours}.mlp", MLP)
    rows += norm_rows(f"{at}.attention.output.LayerNorm", f"{ours}.ln1")
    rows += norm_rows(f"{at}.output.LayerNorm", f"{ours}.ln2")
    first = embed.word_embeddings.padding_idx if _counts_text(embed) else 0

    def positions(table: Tensor, types: Tensor) -> Tensor:
        return table[first:] + types[0]

    return WeightMap.parse(rows, {"positions": positions})


def _hooks(embeddings: str, encoder: str, spec: TextSpec) -> HookMap:
    rows = f"""
        {embeddings}.word_embeddings  ->  hook_embed
        {embeddings}.LayerNorm : in   ->  hook_full_embed
    """
    rows += norm_hooks(f"{embeddings}.LayerNorm", "ln_pre", "hook_ln_pre")
    rows += BLOCKS_HOOKS.replace("{at}", f"{encoder}.{{l}}")
    return HookMap.parse(rows, h=spec.blocks[0].attn.n_heads)


class ChineseText(Tower):
    """BERT. Alone it returns all tokens; the pooled output beside them is left out."""

    types = models("chinese_clip.modeling_chinese_clip.ChineseCLIPTextModel")
    pooled = TextPoolSpec(kind="first")  # what a projection behind it reads

    def spec(self, upstream: Reader) -> TextSpec:
        facts = _embedded(upstream.embeddings, list(upstream.encoder.layer))
        return TextSpec(**facts, pool=TextPoolSpec(kind="none"))

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        pooler = WeightMap.parse("ignore pooler.{*} : makes a second output of the first token")
        layer = upstream.encoder.layer[0]
        return _rows(upstream.embeddings, layer, "embeddings", "encoder.layer") | pooler

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, TextSpec)
        return _hooks("embeddings", "encoder.layer", spec)


class AltText(Tower):
    """RoBERTa, a norm and a linear layer; the first token is read."""

    types = models("altclip.modeling_altclip.AltCLIPTextModel")

    def spec(self, upstream: Reader) -> TextSpec:
        return TextSpec(
            **_embedded(upstream.roberta.embeddings, list(upstream.roberta.encoder.layers)),
            ln_final=norm(upstream.pre_LN),
            pool=TextPoolSpec(kind="first"),
            n_classes=linear(upstream.transformation).out_features,
        )

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        ends = WeightMap.parse(linear_rows("transformation", "head") + norm_rows("pre_LN", "ln_final"))
        layer = upstream.roberta.encoder.layers[0]
        return _rows(upstream.roberta.embeddings, layer, "roberta.embeddings", "roberta.encoder.layers") | ends

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, TextSpec)
        ends = HookMap.parse(norm_hooks("pre_LN", "ln_final", "hook_ln_final"))
        return _hooks("roberta.embeddings", "roberta.encoder.layers", spec) | ends


class OpenClipText(Tower):
    """RoBERTa in open_clip's wrapping: the mean of the text, and one linear layer or two with an activation between."""

    types = ("open_clip.hf_model.HFTextEncoder",)
    inner = models("roberta.modeling_roberta.RobertaModel", "xlm_roberta.modeling_xlm_roberta.XLMRobertaModel")
    ignored: ClassVar[Mapping[str, str]] = {
        **Tower.ignored,
        "HFTextEncoder.*": "read from the modules",
        "ClsLastHiddenStatePooler.cls_token_position": "the first",
        "*.is_decoder": "read as is_causal",
        "*.add_cross_attention": "there is none where nothing is decoded",
        "*.is_cross_attention": "there is none where nothing is decoded",
        "*.layer_idx": "which layer it is",
    }

    def spec(self, upstream: Reader) -> TextSpec:
        text = upstream.transformer
        if not text.is_a(*self.inner):
            raise upstream.unsupported(f"a text tower of transformers ({type(text.module).__name__})")
        if text.config.is_decoder:
            raise text.unsupported("config.is_decoder, which masks what comes after a token")
        if upstream.config.pad_token_id != text.embeddings.word_embeddings.padding_idx:
            raise upstream.unsupported("config.pad_token_id of another token than its embedding's padding_idx")
        pools = {"open_clip.hf_model.MeanPooler": "avg", "open_clip.hf_model.ClsLastHiddenStatePooler": "first"}
        kind = next((pools[name] for name in pools if upstream.pooler.is_a(name)), None)
        if kind is None:
            raise upstream.pooler.unsupported("its kind of pooling")
        width, head = _projection(upstream.proj)
        return TextSpec(
            **_embedded(text.embeddings, list(text.encoder.layer)),
            pool=TextPoolSpec(kind=kind),
            n_classes=width,
            head=head,
        )

    def weights(self, upstream: Reader, spec: AnySpec) -> WeightMap:
        assert isinstance(spec, TextSpec)
        head = linear_rows("proj", "head")
        if spec.head is not None:
            head = linear_rows("proj.0", "head_mlp.fc_in") + linear_rows("proj.2", "head_mlp.fc_out")
        head += "ignore transformer.pooler.{*} : makes a second output of the first token, which is not read\n"
        text = upstream.transformer
        layer = text.encoder.layer[0]
        table = _rows(text.embeddings, layer, "transformer.embeddings", "transformer.encoder.layer")
        return table | WeightMap.parse(head)

    def hooks(self, upstream: Reader, spec: AnySpec) -> HookMap:
        assert isinstance(spec, TextSpec)
        ends = """
            pooler  ->  hook_pooled
            proj    ->  hook_logits
        """
        if spec.head is not None:
            ends += """
                proj.0       ->  head_mlp.hook_pre
                proj.2 : in  ->  head_mlp.hook_post
            """
        return _hooks("transformer.embeddings", "transformer.encoder.layer", spec) | HookMap.parse(ends)

    def call(self, upstream: nn.Module, *inputs: Tensor) -> Tensor:
        return self.output(upstream(*inputs))


def _projection(proj: Reader) -> tuple[int | None, MlpSpec | None]:
    if not proj.is_a("Sequential"):
        return READ.classes(proj), None
    if len(proj) != 3:
        raise proj.unsupported("a projection that is neither one linear layer nor two")
    first, act, second = proj
    return linear(second).out_features, MlpSpec(d_mlp=linear(first).out_features, act=READ.activation(act))


def through(first: str, second: str, target: str) -> WeightMap:
    """Return the rows of two linear layers, one behind the other, as the one they are together."""

    def weight(a: Tensor, b: Tensor) -> Tensor:
        return b @ a

    def bias(a: Tensor, b: Tensor) -> Tensor:
        return torch.mv(b, a)

    rows = f"""
        [{first}.weight, {second}.weight]  ->  {target}.weight  : {{weight}}
        [{first}.bias, {second}.weight]    ->  {target}.bias    : {{bias}}
    """
    return WeightMap.parse(rows, {"weight": weight, "bias": bias})
