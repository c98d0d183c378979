"""Equations of canonical models: each hook point equals what its equation says, and the parts sum to the logits."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.checks import claims
from prisma_conformance.checks.claims import Acts, Claim, Claims, Part
from prisma_conformance.checks.equations import edited_pass
from prisma_conformance.finding import Finding
from prisma_conformance.measure import worst
from prisma_conformance.subject import Inputs, Subject
from prisma_core import HookedDual, HookedText, HookedViT, ZooModel
from prisma_core.transformer.attention import Rope
from prisma_core.transformer.block import Block, SideBySide


@torch.no_grad()
def algebra(subject: Subject) -> Finding:
    """Evaluate the equation of each hook point, and list the points that nothing proves."""
    passes, bound, model = subject.passes(), tolerances.routes(subject.spec), subject.pair().model
    first, points = tuple(x[:1] for x in passes.inputs), list(model.hook_points())  # derived activations are large
    whole = dict(model.run_with_cache(*first, names=points)[1].store)
    runs = [(passes.inputs, passes.acts), (first, whole)]
    errors: dict[tuple[str, str], float] = {}
    for inputs, acts in runs:
        for claim, error in equations(model, inputs, acts).items():
            errors[claim] = max(errors.get(claim, 0.0), error)
    problems = [f"{point} = {equation}: off by {e:.1e}" for (point, equation), e in errors.items() if not e <= bound]
    for inputs, acts in runs if not problems else ():
        before, after = edited_pass(model, inputs, list(acts), subject.generator(8))
        for (point, equation), e in equations(model, inputs, after, before).items():
            if not e <= bound:
                problems.append(f"{point} = {equation}, with every hook point edited: off by {e:.1e}")
    claimed = {point for point, _ in errors}
    problems += [f"{point} is in no hook map and no equation" for point in _unproven(subject, claimed)]
    kinds = {_family(f"{point} = {equation}") for point, equation in errors}
    return Finding(max(errors.values()), bound, tuple(problems), f"{len(errors)} equations of {len(kinds)} kinds")


def equations(
    model: ZooModel, inputs: Inputs, acts: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None
) -> dict[tuple[str, str], float]:
    """Error of each equation, by hook point and text.

    Args:
        model, inputs: of the pass.
        acts: its activations, as hooks left them: all, or all but the derived ones, which it then has not computed.
        before: what came to each hook point, where hooks changed it. Only the steps are evaluated then: an equation
            holds between what came to its point and what went on from those it reads.
    """
    errors: dict[tuple[str, str], float] = {}
    left = acts if before is None else before
    for point, equation, value, step in _model(model, Acts(acts), inputs):
        if step or before is None:
            errors[point, equation] = worst(left[point], value)
    return errors


def _unproven(subject: Subject, claimed: set[str]) -> list[str]:
    """Kinds of hook points in no equation and no row: they may hold anything."""
    points = list(subject.pair().model.hook_points())
    mapped = {row.hook for row in subject.table().bound(points)}
    return sorted({_family(point) for point in points if point not in claimed and point not in mapped})


def _family(text: str) -> str:
    return re.sub(r"blocks\.\d+", "blocks.{l}", text)


# -------------------------------------------------------------------- models


def _model(model: ZooModel, acts: Acts, inputs: Inputs) -> Claims:
    if isinstance(model, HookedDual):
        yield from _dual(model, acts, inputs)
    elif isinstance(model, HookedText):
        (tokens,) = inputs
        x = yield from _text_embedding(model, acts, tokens)
        x, total = yield from _blocks(model, acts, x, _hidden(model, tokens))
        yield acts.claim("hook_logits", "unembed(the sum of the parts)", model.unembed(total, tokens), step=False)
        yield acts.claim("hook_pooled", "the token that pooling names", _named(model, x, tokens))
        yield from _head(model, acts)
    elif isinstance(model, HookedViT):
        (image,) = inputs
        x = yield from _embedding(model, acts, image)
        x, total = yield from _blocks(model, acts, x, None)
        yield acts.claim("hook_logits", "unembed(the sum of the parts)", model.unembed(total), step=False)
        yield from _pooling(model, acts, x)
        yield from _head(model, acts, x)


def _dual(model: HookedDual, acts: Acts, inputs: Inputs) -> Claims:
    embeds: list[Tensor] = []
    for (prefix, tower), x, name in zip(model.towers().items(), inputs, ("image", "text"), strict=True):
        yield from _model(tower, acts.under(prefix.removesuffix(".")), (x,))
        features = acts[f"{prefix}hook_logits"]
        unit = features / features.square().sum(-1, keepdim=True).sqrt()
        yield acts.claim(f"hook_{name}_embed", f"{prefix}logits, of unit length", unit)
        embeds.append(acts[f"hook_{name}_embed"])
    similarity = torch.einsum("ie,te->it", *embeds) * torch.exp(model.logit_scale)
    bias = model.logit_bias if model.spec.logit_bias else 0
    yield acts.claim("hook_logits", "image_embed . text_embed * exp(logit_scale) + logit_bias", similarity + bias)


def _layers(model: HookedViT | HookedText) -> list[tuple[int, Block | SideBySide]]:
    return [(index, layer) for index, layer in enumerate(model.blocks) if isinstance(layer, Block | SideBySide)]


# -------------------------------------------------------------------- before the blocks


def _embedding(model: HookedViT, acts: Acts, image: Tensor) -> Part:
    embed, layout = model.embed, model.spec.layout
    if embed.spec.stem == "conv":
        kernel, bias = embed.proj.weight.flatten(1), cast(Tensor, embed.proj.bias)
        projected = _pixels(model, image) @ kernel.T + bias
        projected = yield from claims.norm(acts.under("embed.norm"), embed.norm, projected)
        yield acts.claim("hook_embed", "pixels of each patch W + b, normed", projected)
    elif embed.spec.norm is not None:
        stemmed = cast(Tensor, embed.stem(image)).flatten(1, -2)
        normed = yield from claims.norm(acts.under("embed.norm"), embed.norm, stemmed)
        yield acts.claim("hook_embed", "norm(stem(image))", normed)
    tokens = acts["hook_embed"]
    if layout.n_prefix:
        tokens = torch.cat([embed.prefix.expand(len(tokens), -1, -1), tokens], 1)
    if (positions := _positions(model)) is not None:
        yield acts.claim("hook_pos_embed", "the embedding of each position", positions.expand_as(tokens))
    return (yield from _embedded(model, acts, tokens))


def _pixels(model: HookedViT, image: Tensor) -> Tensor:
    """Pixels under each kernel ``[batch patch pixel]``."""
    spec, layout = model.spec.embed, model.spec.layout
    (p, q), t = spec.patch, spec.tubelet or 1
    video = image if spec.tubelet else image[:, None]
    video = video[..., : layout.rows * p, : layout.columns * q]
    return rearrange(video, "b (f t) i (r p) (c q) -> b (f r c) (i t p q)", t=t, p=p, q=q)


def _positions(model: HookedViT) -> Tensor | None:
    """Embedding of each position ``[pos d_model]``; None where there is none, or where it is resized to the grid."""
    embed, layout = model.embed, model.spec.layout
    if not embed.spec.pos or embed.pos_grid != (layout.rows, layout.columns):
        return None
    how = embed.spec.interpolation
    if not embed.spec.pos_factorized:
        in_float32 = how is not None and how.rounded == "native"
        return embed.pos_embed.float().double() if in_float32 else embed.pos_embed
    if how is not None and how.square and layout.rows != layout.columns:
        return None
    patches = (embed.pos_rows[:, None] + embed.pos_columns).flatten(0, 1)
    return torch.cat([patches.new_zeros(layout.n_prefix, patches.shape[1]), patches])


def _text_embedding(model: HookedText, acts: Acts, ids: Tensor) -> Part:
    embed = model.embed
    yield acts.claim("hook_embed", "W_E[token]", embed.W_E[ids])
    tokens = acts["hook_embed"]
    if model.spec.suffix:
        tokens = torch.cat([tokens, embed.suffix.expand(len(tokens), 1, -1)], 1)
    rows = torch.arange(tokens.shape[1]).expand(tokens.shape[:2])
    if model.spec.pos_by_text:
        text = ids != model.spec.pad_id
        rows = torch.stack([one.cumsum(0).where(one, torch.zeros(())) for one in text]).long()
    positions = embed.pos_embed[rows.to(ids.device)]
    yield acts.claim("hook_pos_embed", "the embedding of each position", positions)
    return (yield from _embedded(model, acts, tokens))


def _embedded(model: HookedViT | HookedText, acts: Acts, tokens: Tensor) -> Part:
    full = acts["hook_full_embed"]
    if "hook_pos_embed" in acts:
        # The stream begins with full_embed, so resid_pre proves full_embed, and this equation proves pos_embed.
        yield acts.claim("hook_pos_embed", "full_embed - prefix and embed", full - tokens, step=False)
        tokens = tokens + acts["hook_pos_embed"]
    yield acts.claim("hook_full_embed", "prefix and embed + pos_embed", tokens)
    if model.spec.ln_pre is None:
        return full
    normed = yield from claims.norm(acts.under("ln_pre"), model.ln_pre, full)
    yield acts.claim("hook_ln_pre", "ln_pre(full_embed)", normed)
    return acts["hook_ln_pre"]


# -------------------------------------------------------------------- along the stream


def _blocks(
    model: HookedViT | HookedText, acts: Acts, stream: Tensor, hidden: Tensor | None
) -> Generator[Claim, None, tuple[Tensor, Tensor]]:
    """Claims along the residual stream; returns what pooling reads, and the sum of the embedding and all branches."""
    total, point = stream, ""
    for index, layer in _layers(model):
        inside = acts.under(f"blocks.{index}")
        yield inside.claim("hook_resid_pre", "the stream so far", stream)
        stream = yield from claims.block(inside, layer, _rope(model, index), hidden)
        if layer.spec.kind == "post":  # a norm of the stream itself: the sum begins anew
            total, point = stream, ""
            continue
        total = total + sum(inside[part] for part in ("hook_attn_out", "hook_mlp_out") if part in inside)
        point = f"blocks.{index}.hook_resid_post"
    if point:
        yield acts.claim(point, "embedding + every attn_out + every mlp_out", total, step=False)
    if model.spec.ln_final is not None:
        normed = yield from claims.norm(acts.under("ln_final"), model.ln_final, stream)
        yield acts.claim("hook_ln_final", "ln_final(the last resid_post)", normed)
        stream = acts["hook_ln_final"]
    return stream, total


def _rope(model: HookedViT | HookedText, layer: int) -> Rope | None:
    if not isinstance(model, HookedViT) or model.spec.rope is None:
        return None
    tables = (model.rope_cos, model.rope_sin)
    return Rope(*(table[layer] if model.spec.rope.per_layer else table for table in tables))


def _hidden(model: HookedText, ids: Tensor) -> Tensor:
    """Keys that each query may not read, those after it and padding: ``[batch 1 query_pos key_pos]``, or one query."""
    spec = model.spec
    padding = ids == spec.pad_id if spec.pad_id is not None else torch.zeros_like(ids).bool()
    if spec.suffix:
        padding = torch.cat([padding, padding.new_zeros(len(ids), 1)], 1)
    padding = padding.roll(spec.pad_lag, 1)[:, None, None, :]
    positions = torch.arange(padding.shape[-1], device=ids.device)
    return padding | (positions > positions[:, None]) if spec.causal else padding


# -------------------------------------------------------------------- behind the blocks


def _named(model: HookedText, x: Tensor, ids: Tensor) -> Tensor:
    pool, pad = model.spec.pool, model.spec.pad_id
    if pool.kind == "none":
        return x
    pooled: list[Tensor] = []
    for vectors, row in zip(x, cast("list[list[int]]", ids.tolist()), strict=True):
        if pool.kind == "avg":
            text = [vector for vector, token in zip(vectors, row, strict=True) if token != pad]
            pooled.append(torch.stack(text).mean(0))
            continue
        ends = {"argmax": row.index(max(row)), "first": 0, "last": len(vectors) - 1}
        pooled.append(vectors[row.index(cast(int, pool.eos_id)) if pool.kind == "eos" else ends[pool.kind]])
    return torch.stack(pooled)


def _pooling(model: HookedViT, acts: Acts, x: Tensor) -> Claims:
    pool, prefix = model.spec.pool, model.spec.layout.n_prefix
    if pool.kind == "none":
        yield acts.claim("hook_pooled", "all tokens", x)
        return
    if pool.kind == "token":
        yield acts.claim("hook_pooled", "the first token", x[:, 0])
        return
    tokens = x if pool.with_prefix else x[:, prefix:]
    mean = tokens.sum(1) / tokens.shape[1]
    if pool.kind == "patches":
        yield acts.claim("hook_pooled", "the patches", tokens)
        return
    if pool.kind == "avg":
        yield acts.claim("hook_pooled", "the mean of the tokens", mean)
        return
    if pool.kind == "token_and_avg":
        yield acts.claim("hook_pooled", "the first token and the mean of the tokens", torch.cat([x[:, 0], mean], -1))
        return
    inside = acts.under("pool")
    out = yield from claims.pool_attention(inside.under("attn"), model.pool.attn, tokens)
    yield inside.claim("hook_attn_out", "z W_O + b_O", out)
    latents = inside["hook_attn_out"]
    if pool.mlp is not None:
        normed = yield from claims.norm(inside.under("ln"), model.pool.ln, latents)
        out = yield from claims.mlp(inside.under("mlp"), model.pool.mlp, normed)
        yield inside.claim("hook_mlp_out", "post W_out + b_out", out)
        latents = latents + inside["hook_mlp_out"]
    pooled = latents[:, 0] if pool.latents == "first" else latents.mean(1)
    yield acts.claim("hook_pooled", f"attn_out + mlp_out, the {pool.latents} latent", pooled)


def _head(model: HookedViT | HookedText, acts: Acts, tokens: Tensor | None = None) -> Claims:
    read = yield from claims.norm(acts.under("ln_pool"), model.ln_pool, acts["hook_pooled"])
    if isinstance(model, HookedText) and model.spec.head is not None:
        logits = yield from claims.mlp(acts.under("head_mlp"), model.head_mlp, read)
        yield acts.claim("hook_logits", "head(ln_pool(pooled))", logits)
        return
    logits = _linear(model, "head", read)
    if isinstance(model, HookedViT) and model.spec.n_heads_out == 2:
        assert tokens is not None
        yield acts.claim("hook_pooled_dist", "the distillation token", tokens[:, model.spec.layout.cls])
        logits = (logits + _linear(model, "head_dist", acts["hook_pooled_dist"])) / 2
    yield acts.claim("hook_logits", "head(ln_pool(pooled))", logits)


def _linear(model: HookedViT | HookedText, name: str, x: Tensor) -> Tensor:
    if model.spec.n_classes is None:
        return x
    head = cast(nn.Linear, getattr(model, name))
    return x @ head.weight.T + head.bias
