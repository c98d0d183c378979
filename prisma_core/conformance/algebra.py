"""What activations are to each other: each hook point holds what its equation says."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prisma_core.conformance import tolerances
from prisma_core.conformance.registry import Finding, register
from prisma_core.conformance.subject import Inputs, Subject, worst
from prisma_core.spec import Activation, BlockSpec
from prisma_core.transformer import Canonical, HookedDual, HookedText, HookedViT
from prisma_core.transformer.attention import Attention
from prisma_core.transformer.block import Block, SideBySide
from prisma_core.transformer.norm import Norm

Claim = tuple[str, Tensor, Tensor]

# Written out here, not taken from the model: its own table is what is checked.
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
}


@register("algebra", "each activation is what its equation makes of the others, and the parts sum to the logits")
@torch.no_grad()
def algebra(subject: Subject) -> Finding:
    model, inputs = subject.pair().model, subject.passes().inputs
    derived = [name for name in model.hook_points() if name.endswith("attn.hook_result")]
    every = [name for name, point in model.hook_points().items() if not point.derived]
    logits, cache = model.run_with_cache(*inputs, names=[*every, *derived])
    claims = list(_claims(model, cache.store, inputs, logits))
    # One bad claim must not hide another, and a claim about activations that are not there proves nothing.
    errors: dict[str, float] = {}
    for claim, ours, theirs in claims:
        errors[claim] = max(errors.get(claim, 0.0), worst(ours, theirs))
    bound = tolerances.routes(subject.spec)
    problems = tuple(f"{claim}: off by {error:.1e}" for claim, error in errors.items() if not error <= bound)
    kinds = {re.sub(r"blocks\.\d+", "blocks.{l}", claim) for claim in errors}
    return Finding(max(errors.values()), bound, problems, f"{len(errors)} equations of {len(kinds)} kinds")


def _claims(model: Canonical, acts: dict[str, Tensor], inputs: Inputs, logits: Tensor) -> Iterator[Claim]:
    yield "hook_logits is the output", acts["hook_logits"], logits
    if isinstance(model, HookedDual):
        yield from _dual(model, acts, inputs)
    elif isinstance(model, HookedText):
        yield from _embedding(model, acts)
        stream, total = yield from _stream(model, acts)
        yield "unembed(the sum of the parts) = logits", model.unembed(total, *inputs), logits
        yield from _ending(model, stream, acts)
        tokens = acts.get("hook_ln_final", stream)
        yield "hook_pooled = the token that pooling names", acts["hook_pooled"], _pooled(model, tokens, *inputs)
    elif isinstance(model, HookedViT):
        yield from _embedding(model, acts)
        stream, total = yield from _stream(model, acts)
        unembedded = model(total, start_at_layer=len(model.blocks))
        yield "unembed(the sum of the parts) = logits", unembedded, logits
        yield from _ending(model, stream, acts)
        yield from _pooling(model, acts.get("hook_ln_final", stream), acts)


def _dual(model: HookedDual, acts: dict[str, Tensor], inputs: Inputs) -> Iterator[Claim]:
    for (prefix, tower), given in zip(model.towers().items(), inputs, strict=True):
        own = {name.removeprefix(prefix): x for name, x in acts.items() if name.startswith(prefix)}
        for claim, ours, theirs in _claims(tower, own, (given,), own["hook_logits"]):
            yield f"{prefix}{claim}", ours, theirs
    embeds: list[Tensor] = []
    for name, tower in (("hook_image_embed", "vision"), ("hook_text_embed", "text")):
        features = acts[f"{tower}.hook_logits"]
        embeds.append(acts[name])
        yield (
            f"{name} = {tower}.hook_logits, of unit length",
            acts[name],
            features / features.norm(dim=-1, keepdim=True),
        )
    alike = torch.einsum("ie,te->it", *embeds) * torch.exp(model.logit_scale)
    yield "hook_logits = image . text * scale", acts["hook_logits"], alike + getattr(model, "logit_bias", 0)


def _pooled(model: HookedText, tokens: Tensor, ids: Tensor) -> Tensor:
    pool = model.spec.pool
    if pool.kind == "none":
        return tokens
    found: list[Tensor] = []
    for x, row in zip(tokens, cast("list[list[int]]", ids.tolist()), strict=True):
        ends = {"argmax": row.index(max(row)), "first": 0, "last": len(row) - 1}
        found.append(x[row.index(cast(int, pool.eos_id)) if pool.kind == "eos" else ends[pool.kind]])
    return torch.stack(found)


def _stream(model: HookedViT | HookedText, acts: dict[str, Tensor]) -> Generator[Claim, None, tuple[Tensor, Tensor]]:
    """Claim what holds along the residual stream; return its end, and the sum of all that was added."""
    stream = acts.get("hook_ln_pre", acts["hook_full_embed"])
    total = stream
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block | SideBySide)
        at = f"blocks.{index}"
        yield f"{at}.hook_resid_pre = the stream so far", acts[f"{at}.hook_resid_pre"], stream
        yield from _block(at, block, acts)
        stream = acts[f"{at}.hook_resid_post"]
        for part in ("hook_attn_out", "hook_mlp_out"):
            total = total + acts[f"{at}.{part}"] if f"{at}.{part}" in acts else total
    yield "embedding + every attn_out + every mlp_out = the last resid_post", total, stream
    return stream, total


def _ending(model: HookedViT | HookedText, stream: Tensor, acts: dict[str, Tensor]) -> Iterator[Claim]:
    if "hook_ln_final" in acts:
        yield from _norm("ln_final", model.ln_final, stream, acts)
        yield "hook_ln_final = ln_final.hook_normalized", acts["hook_ln_final"], acts["ln_final.hook_normalized"]


def _pooling(model: HookedViT, tokens: Tensor, acts: dict[str, Tensor]) -> Iterator[Claim]:
    pool, prefix = model.spec.pool, model.spec.layout.n_prefix
    if pool.kind == "none":
        yield "hook_pooled = all tokens", acts["hook_pooled"], tokens
    elif pool.kind == "token":
        yield "hook_pooled = the first token", acts["hook_pooled"], tokens[:, 0]
    elif pool.kind == "avg":
        yield "hook_pooled = the mean", acts["hook_pooled"], tokens[:, 0 if pool.with_prefix else prefix :].mean(1)


def _embedding(model: HookedViT | HookedText, acts: dict[str, Tensor]) -> Iterator[Claim]:
    tokens = acts["hook_embed"]
    if isinstance(model, HookedViT) and model.spec.layout.n_prefix:
        tokens = torch.cat([model.embed.prefix.expand(tokens.shape[0], -1, -1), tokens], 1)
    if "hook_pos_embed" in acts:
        tokens = tokens + acts["hook_pos_embed"]
    yield "prefix and embed + pos_embed = full_embed", acts["hook_full_embed"], tokens
    if "hook_ln_pre" in acts:
        yield "ln_pre.hook_normalized = hook_ln_pre", acts["hook_ln_pre"], acts["ln_pre.hook_normalized"]
        yield from _norm("ln_pre", model.ln_pre, acts["hook_full_embed"], acts)


def _block(at: str, block: Block | SideBySide, acts: dict[str, Tensor]) -> Iterator[Claim]:
    spec = block.spec
    pre, attn_out = acts[f"{at}.hook_resid_pre"], acts[f"{at}.hook_attn_out"]
    total = pre + attn_out
    if spec.mlp is not None:
        if f"{at}.hook_resid_mid" in acts:
            yield f"{at}: resid_mid = resid_pre + attn_out", acts[f"{at}.hook_resid_mid"], total
            total = acts[f"{at}.hook_resid_mid"]
        total = total + acts[f"{at}.hook_mlp_out"]
    yield f"{at}: resid_post = resid_mid + mlp_out", acts[f"{at}.hook_resid_post"], total
    if spec.kind != "res_post":
        for name, norm in _parts(block, "ln1"):
            yield from _norm(f"{at}.{name}", norm, pre, acts)
        for name, norm in _parts(block, "ln2"):
            yield from _norm(f"{at}.{name}", norm, acts.get(f"{at}.hook_resid_mid"), acts)
    yield from _attentions(at, block, acts)
    for name, _ in _parts(block, "mlp"):
        if f"{at}.{name}.hook_pre" in acts:
            yield from _mlp(f"{at}.{name}", spec, acts)


def _parts(block: Block | SideBySide, part: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield each of a block's parts of one kind with its path below the block: one, or several side by side."""
    found = getattr(block, part, None)
    if isinstance(found, nn.ModuleList):
        yield from ((f"{part}.{index}", one) for index, one in enumerate(found))
    elif found is not None:
        yield part, found


def _attentions(at: str, block: Block | SideBySide, acts: dict[str, Tensor]) -> Iterator[Claim]:
    total = torch.zeros(())
    for (name, attn), (_, scale) in zip(_parts(block, "attn"), _parts(block, "ls1"), strict=True):
        assert isinstance(attn, Attention)
        yield from _attention(f"{at}.{name}", attn, acts)
        if f"{at}.{name}.hook_result" not in acts:
            return
        out = acts[f"{at}.{name}.hook_result"].sum(2) + attn.b_O
        if block.spec.kind == "res_post":
            yield from _norm(f"{at}.ln1", block.ln1, out, acts)
            out = acts[f"{at}.ln1.hook_normalized"]
        total = total + out * _gamma(scale)
    yield f"{at}: heads + bias, scaled = attn_out", acts[f"{at}.hook_attn_out"], total


def _attention(at: str, attn: Attention, acts: dict[str, Tensor]) -> Iterator[Claim]:
    def get(name: str) -> Tensor:
        return acts[f"{at}.{name}"]

    scores, pattern, z = get("hook_attn_scores"), get("hook_pattern"), get("hook_z")
    yield f"{at}: pattern = softmax(scores)", pattern, torch.exp(scores - scores.logsumexp(-1, keepdim=True))
    yield f"{at}: pattern rows sum to 1", pattern.sum(-1) + pattern[..., 0], 1 + pattern[..., 0]
    groups = attn.spec.n_heads // attn.spec.n_kv_heads
    q, k = (acts.get(f"{at}.hook_rot_{x}", get(f"hook_{x}")) for x in "qk")
    k, v = k.repeat_interleave(groups, 2), get("hook_v").repeat_interleave(groups, 2)
    products = torch.einsum("bqhd,bkhd->bhqk", q, k) * attn.spec.scale
    products = products + (attn.attn_bias if attn.spec.bias else 0)
    hidden = torch.isneginf(scores)  # what a mask hides is proven by parity
    yield f"{at}: scores = q . k * scale + bias", scores, products.masked_fill(hidden, -torch.inf)
    yield f"{at}: pattern v = z", z, torch.einsum("bhqk,bkhd->bqhd", pattern, v)


def _gamma(scale: nn.Module) -> Tensor:
    return next(iter(scale.parameters()), torch.ones(()))


def _mlp(at: str, spec: BlockSpec, acts: dict[str, Tensor]) -> Iterator[Claim]:
    assert spec.mlp is not None
    made = ACTIVATIONS[spec.mlp.act](acts[f"{at}.hook_pre"])
    if spec.mlp.gated:
        made = made * acts[f"{at}.hook_pre_linear"]
    held = "hook_mid" if spec.mlp.inner_norm is not None else "hook_post"
    yield f"{at}.{held} = act(pre)", acts[f"{at}.{held}"], made


def _norm(name: str, norm: object, x: Tensor | None, acts: dict[str, Tensor]) -> Iterator[Claim]:
    if not isinstance(norm, Norm) or x is None or f"{name}.hook_scale" not in acts:
        return
    centred = x - x.mean(-1, keepdim=True) if norm.spec.kind == "ln" else x
    scale = (centred.square().mean(-1, keepdim=True) + norm.spec.eps).sqrt()
    yield f"{name}.hook_scale = sqrt(variance + eps)", acts[f"{name}.hook_scale"], scale
    normalized = F.layer_norm(x, x.shape[-1:], eps=norm.spec.eps) if norm.spec.kind == "ln" else x / scale
    normalized = normalized * norm.weight + (0 if norm.bias is None else norm.bias)
    yield f"{name}.hook_normalized = x / scale * weight + bias", acts[f"{name}.hook_normalized"], normalized
