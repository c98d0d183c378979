"""What activations are to each other: each hook point holds what its equation says."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.checks import claims
from prisma_conformance.checks.claims import Acts, Claim, Claims, Part
from prisma_conformance.registry import Finding, register
from prisma_conformance.subject import Inputs, Subject, worst
from prisma_core.transformer import HookedDual, HookedText, HookedViT, ZooModel
from prisma_core.transformer.attention import Rope
from prisma_core.transformer.block import Block, SideBySide


@register("algebra", "each activation is what its equation makes of the others, and the parts sum to the logits")
@torch.no_grad()
def algebra(subject: Subject) -> Finding:
    passes, bound = subject.passes(), tolerances.routes(subject.spec)
    errors = equations(subject.pair().model, passes.inputs, passes.acts)
    problems = [f"{point} = {equation}: off by {e:.1e}" for (point, equation), e in errors.items() if not e <= bound]
    problems += [f"{point} is in no hook map and no equation" for point in _unproven(subject, {p for p, _ in errors})]
    kinds = {_family(f"{point} = {equation}") for point, equation in errors}
    return Finding(max(errors.values()), bound, tuple(problems), f"{len(errors)} equations of {len(kinds)} kinds")


def equations(model: ZooModel, inputs: Inputs, acts: dict[str, Tensor]) -> dict[tuple[str, str], float]:
    """Return how far each hook point is from what each equation makes of the others.

    Args:
        model, inputs: of the pass.
        acts: all of its activations but the derived ones.
    """
    # One bad claim must not hide another, and a claim about activations that are not there proves nothing.
    errors: dict[tuple[str, str], float] = {}
    asked = _asked(model, inputs)
    for held, made in ((acts, _model(model, Acts(acts), inputs)), (asked, _derived(model, acts) if asked else ())):
        for point, equation, value in made:
            errors[point, equation] = max(errors.get((point, equation), 0.0), worst(held[point], value))
    return errors


def _asked(model: ZooModel, inputs: Inputs) -> dict[str, Tensor]:
    """Return what is computed only when it is asked for, of one input: it is large."""
    derived = [name for name, point in model.hook_points().items() if point.derived]
    if not derived:
        return {}
    logits = [name for name in model.hook_points() if name.endswith("hook_logits")]
    _, cache = model.run_with_cache(*(x[:1] for x in inputs), names=[*derived, *logits])
    return cache.store


def _unproven(subject: Subject, claimed: set[str]) -> list[str]:
    """Return the hook points that nothing speaks of: they may hold anything."""
    upstream, model = subject.pair()
    points = list(model.hook_points())
    mapped = {row.hook for row in subject.table(upstream).bound(points)}
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
        yield acts.claim("hook_logits", "unembed(the sum of the parts)", model.unembed(total, tokens))
        yield acts.claim("hook_pooled", "the token that pooling names", _named(model, x, tokens))
        yield from _head(model, acts)
    elif isinstance(model, HookedViT):
        (image,) = inputs
        x = yield from _embedding(model, acts, image)
        x, total = yield from _blocks(model, acts, x, None)
        yield acts.claim("hook_logits", "unembed(the sum of the parts)", model.unembed(total))
        yield from _pooling(model, acts, x)
        yield from _head(model, acts, x)


def _dual(model: HookedDual, acts: Acts, inputs: Inputs) -> Claims:
    embeds: list[Tensor] = []
    for (tower, own), given, name in zip(model.towers().items(), inputs, ("image", "text"), strict=True):
        prefix = tower.removesuffix(".")
        yield from _model(own, acts.under(prefix), (given,))
        features = acts[f"{tower}hook_logits"]
        unit = features / features.square().sum(-1, keepdim=True).sqrt()
        yield acts.claim(f"hook_{name}_embed", f"{tower}logits, of unit length", unit)
        embeds.append(acts[f"hook_{name}_embed"])
    alike = torch.einsum("ie,te->it", *embeds) * torch.exp(model.logit_scale)
    bias = model.logit_bias if model.spec.logit_bias else 0
    yield acts.claim("hook_logits", "image_embed . text_embed * exp(logit_scale) + logit_bias", alike + bias)


def _derived(model: ZooModel, plain: dict[str, Tensor]) -> Claims:
    """Claim what is computed only when it is asked for; asking must not change what comes out."""
    for prefix, tower in model.towers().items():
        if not isinstance(tower, HookedViT | HookedText):
            continue
        acts = Acts({name: x[:1] for name, x in plain.items() if name.startswith(prefix)}, prefix)
        for index, layer in _layers(tower):
            yield from claims.derived(acts.under(f"blocks.{index}"), layer)
        yield acts.claim("hook_logits", "the same, whatever is asked for", acts["hook_logits"])


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
    """Return the pixels under each kernel ``[batch patch pixel]``."""
    spec, layout = model.spec.embed, model.spec.layout
    (p, q), t = spec.patch, spec.tubelet or 1
    video = image if spec.tubelet else image[:, None]
    video = video[..., : layout.rows * p, : layout.columns * q]
    return rearrange(video, "b (f t) i (r p) (c q) -> b (f r c) (i t p q)", t=t, p=p, q=q)


def _positions(model: HookedViT) -> Tensor | None:
    """Return what is kept for each position; None where there is nothing, or where it is resized to the grid."""
    embed, layout = model.embed, model.spec.layout
    if not embed.spec.pos or embed.pos_grid != (layout.rows, layout.columns):
        return None
    if not embed.spec.pos_factorized:
        return embed.pos_embed
    how = embed.spec.interpolation
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
        # The stream begins with full_embed, so that resid_pre says what it holds, and this what was added.
        yield acts.claim("hook_pos_embed", "full_embed - prefix and embed", full - tokens)
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
    """Claim what holds along the residual stream; return what pooling reads, and the sum of all that was added."""
    total, point = stream, ""
    for index, layer in _layers(model):
        own = acts.under(f"blocks.{index}")
        yield own.claim("hook_resid_pre", "the stream so far", stream)
        stream = yield from claims.block(own, layer, _rope(model, index), hidden)
        if layer.spec.kind == "post":  # the stream itself is normed, so it is no sum of what was added
            total, point = stream, ""
            continue
        total = total + sum(own[part] for part in ("hook_attn_out", "hook_mlp_out") if part in own)
        point = f"blocks.{index}.hook_resid_post"
    if point:
        yield acts.claim(point, "embedding + every attn_out + every mlp_out", total)
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
    """Return which keys each query may not read: those after it, and padding."""
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
    found: list[Tensor] = []
    for own, row in zip(x, cast("list[list[int]]", ids.tolist()), strict=True):
        if pool.kind == "avg":
            found.append(torch.stack([vector for vector, token in zip(own, row, strict=True) if token != pad]).mean(0))
            continue
        ends = {"argmax": row.index(max(row)), "first": 0, "last": len(own) - 1}
        found.append(own[row.index(cast(int, pool.eos_id)) if pool.kind == "eos" else ends[pool.kind]])
    return torch.stack(found)


def _pooling(model: HookedViT, acts: Acts, x: Tensor) -> Claims:
    pool, prefix = model.spec.pool, model.spec.layout.n_prefix
    if pool.kind == "none":
        yield acts.claim("hook_pooled", "all tokens", x)
        return
    if pool.kind == "token":
        yield acts.claim("hook_pooled", "the first token", x[:, 0])
        return
    taken = x if pool.with_prefix else x[:, prefix:]
    if pool.kind == "patches":
        yield acts.claim("hook_pooled", "the patches", taken)
        return
    if pool.kind == "token_and_avg":
        both = torch.cat([x[:, 0], taken.sum(1) / taken.shape[1]], -1)
        yield acts.claim("hook_pooled", "the first token and the mean of the tokens", both)
        return
    if pool.kind in ("patches", "avg", "token_and_avg"):
        mean = taken.sum(1) / taken.shape[1]
        held = {"patches": taken, "avg": mean, "token_and_avg": torch.cat([x[:, 0], mean], 1)}[pool.kind]
        yield acts.claim("hook_pooled", f"{pool.kind} of the tokens", held)
        return
    own = acts.under("pool")
    out = yield from claims.pool_attention(own.under("attn"), model.pool.attn, taken)
    yield own.claim("hook_attn_out", "z W_O + b_O", out)
    latents = own["hook_attn_out"]
    if pool.mlp is not None:
        normed = yield from claims.norm(own.under("ln"), model.pool.ln, latents)
        out = yield from claims.mlp(own.under("mlp"), model.pool.mlp, normed)
        yield own.claim("hook_mlp_out", "post W_out + b_out", out)
        latents = latents + own["hook_mlp_out"]
    pooled = latents[:, 0] if pool.latents == "first" else latents.mean(1)
    yield acts.claim("hook_pooled", f"attn_out + mlp_out, the {pool.latents} latent", pooled)


def _head(model: HookedViT | HookedText, acts: Acts, tokens: Tensor | None = None) -> Claims:
    read = yield from claims.norm(acts.under("ln_pool"), model.ln_pool, acts["hook_pooled"])
    if isinstance(model, HookedText) and model.spec.head is not None:
        made = yield from claims.mlp(acts.under("head_mlp"), model.head_mlp, read)
        yield acts.claim("hook_logits", "head(ln_pool(pooled))", made)
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
