"""Equations of the parts of a block, written out in plain operations: the modules' own forward is what is checked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from prisma_core.plugin import Activation, AttentionSpec
from prisma_core.transformer.attention import Attention, Rope
from prisma_core.transformer.block import Block, SideBySide
from prisma_core.transformer.mlp import MLP
from prisma_core.transformer.norm import Norm, Scale
from prisma_core.transformer.pool import PoolAttention

# Written out, not imported from the model: its own table is what is checked.
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
}


class Claim(NamedTuple):
    """Assertion: the activation at ``point`` equals ``value``, computed from other activations and weights.

    Attributes:
        step: whether the model computes the point from what ``value`` is computed from, so that the equation holds
            whatever hooks make of that. Sums over all layers, and a pattern's rows, are no steps.
    """

    point: str
    equation: str
    value: Tensor
    step: bool = True


Claims = Iterator[Claim]
Part = Generator[Claim, None, Tensor]  # claims, and the output of the part


@dataclass(frozen=True)
class Acts:
    """The activations of one pass, below a path."""

    store: Mapping[str, Tensor]
    at: str = ""

    def __getitem__(self, name: str) -> Tensor:
        return self.store[self.at + name]

    def __contains__(self, name: str) -> bool:
        return self.at + name in self.store

    def under(self, part: str) -> Acts:
        return Acts(self.store, f"{self.at}{part}.")

    def claim(self, name: str, equation: str, value: Tensor, *, step: bool = True) -> Claim:
        return Claim(self.at + name, equation, value, step)


# -------------------------------------------------------------------- norms and MLPs


def norm(acts: Acts, module: nn.Module, x: Tensor) -> Part:
    """Claims about a norm of ``x [... d]``; nothing where there is none."""
    if not isinstance(module, Norm):
        return x
    centred, scale = _centred(module, x)
    yield acts.claim("hook_scale", "sqrt(mean square of centred x + eps)", scale)
    normalized = centred / acts["hook_scale"] * module.weight + (0 if module.bias is None else module.bias)
    yield acts.claim("hook_normalized", "centred x / scale * weight + bias", normalized)
    return acts["hook_normalized"]


def _centred(module: Norm, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` less its mean where the norm takes it out, and what that is divided by."""
    centred = x - x.mean(-1, keepdim=True) if module.spec.kind == "ln" else x
    return centred, (centred.square().mean(-1, keepdim=True) + module.spec.eps).sqrt()


def mlp(acts: Acts, module: MLP, x: Tensor) -> Part:
    """Claims about an MLP of ``x [... d]``."""
    spec = module.spec
    x = yield from norm(acts.under("pre_norm"), module.pre_norm, x)
    if spec.gated:
        yield acts.claim("hook_pre", "x W_gate + b_gate", x @ module.W_gate + module.fc_gate.bias)
        yield acts.claim("hook_pre_linear", "x W_in + b_in", x @ module.W_in + module.b_in)
        post, equation = ACTIVATIONS[spec.act](acts["hook_pre"]) * acts["hook_pre_linear"], "act(pre) * pre_linear"
    else:
        yield acts.claim("hook_pre", "x W_in + b_in", x @ module.W_in + module.b_in)
        post, equation = ACTIVATIONS[spec.act](acts["hook_pre"]), "act(pre)"
    if spec.inner_norm is None:
        yield acts.claim("hook_post", equation, post)
    else:
        yield acts.claim("hook_mid", equation, post)
        post = yield from norm(acts.under("ln"), module.ln, acts["hook_mid"])
        yield acts.claim("hook_post", "ln(mid)", post)
    return acts["hook_post"] @ module.W_out + module.b_out


# -------------------------------------------------------------------- attention


def attention(acts: Acts, attn: Attention, x: Sequence[Tensor], rope: Rope | None, hidden: Tensor | None) -> Part:
    """Claims about attention.

    Args:
        acts, attn: its activations and the module.
        x: what queries, keys and values are made of: ``[batch pos 1|head d_model]`` each.
        rope: tables of this layer.
        hidden: keys that each query may not read: ``[batch 1 query_pos key_pos]``.
    """
    weights = ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
    q, k, v = (torch.einsum("bphm,hmd->bphd", one, W) + b for one, (W, b) in zip(x, weights, strict=True))
    q = yield from _head_norm(acts.under("q_norm"), attn.q_norm, attn.spec.qk_norm_over, q)
    k = yield from _head_norm(acts.under("k_norm"), attn.k_norm, attn.spec.qk_norm_over, k)
    yield acts.claim("hook_q", "x W_Q + b_Q, normed", q)
    yield acts.claim("hook_k", "x W_K + b_K, normed", k)
    yield acts.claim("hook_v", "x W_V + b_V", v)
    q, k, v = acts["hook_q"], acts["hook_k"], acts["hook_v"]
    if rope is not None and attn.rope_layout is not None:
        yield acts.claim("hook_rot_q", "q turned by its position", _turned(q, rope, attn.rope_layout))
        yield acts.claim("hook_rot_k", "k turned by its position", _turned(k, rope, attn.rope_layout))
        q, k = acts["hook_rot_q"], acts["hook_rot_k"]
    groups = attn.spec.n_heads // attn.spec.n_kv_heads
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    yield from _attend(acts, attn.spec, q, k, v, attn.attn_bias if attn.spec.bias else None, hidden)
    z = yield from norm(acts.under("ln"), attn.ln, acts["hook_z"].flatten(2))
    z = z.view(acts["hook_z"].shape)
    if "hook_result" not in acts:
        return einsum(z, attn.W_O, "batch pos head d, head d d_model -> batch pos d_model") + attn.b_O
    result = einsum(z, attn.W_O, "batch pos head d, head d d_model -> batch pos head d_model")
    yield acts.claim("hook_result", "z W_O, of each head", result)
    return acts["hook_result"].sum(2) + attn.b_O


def pool_attention(acts: Acts, attn: PoolAttention, x: Tensor) -> Part:
    """Claims about attention pooling of the tokens ``x [batch pos d_model]``."""
    onto = "... d_model, head d_model d_head -> ... head d_head"
    b_K, b_V = rearrange(attn.kv.bias, "(two head d_head) -> two head d_head", two=2, head=attn.spec.n_heads)
    latents = attn.latent.expand(x.shape[0], -1, -1)
    latents = yield from norm(acts.under("ln_latent"), attn.ln_latent, latents)
    q = einsum(latents, attn.W_Q, onto) + attn.q.bias.view(attn.spec.n_heads, -1)
    q = yield from norm(acts.under("q_norm"), attn.q_norm, q)
    k = yield from norm(acts.under("k_norm"), attn.k_norm, einsum(x, attn.W_K, onto) + b_K)
    yield acts.claim("hook_q", "latent W_Q + b_Q, normed", q)
    yield acts.claim("hook_k", "x W_K + b_K, normed", k)
    yield acts.claim("hook_v", "x W_V + b_V", einsum(x, attn.W_V, onto) + b_V)
    yield from _attend(acts, attn.spec, acts["hook_q"], acts["hook_k"], acts["hook_v"], None, None)
    return einsum(acts["hook_z"], attn.W_O, "batch latent head d, head d d_out -> batch latent d_out") + attn.out.bias


def _head_norm(acts: Acts, module: nn.Module, over: str, x: Tensor) -> Part:
    """Claims about a norm of queries or keys: of each head, or of all heads together."""
    normed = yield from norm(acts, module, x.flatten(2) if over == "all_heads" else x)
    return normed.view(x.shape)


def _turned(x: Tensor, rope: Rope, layout: str) -> Tensor:
    """Turn channels in pairs: ``i`` and its partner ``j`` become ``i cos - j sin`` and ``j cos + i sin``."""
    channel, half = torch.arange(x.shape[-1], device=x.device), x.shape[-1] // 2
    first = channel < half if layout == "half" else channel % 2 == 0
    distance = half if layout == "half" else 1
    partner = torch.where(first, channel + distance, channel - distance)
    return x * rope.cos + torch.where(first, -x[..., partner], x[..., partner]) * rope.sin


def _attend(
    acts: Acts, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, hidden: Tensor | None
) -> Claims:
    products = einsum(q, k, "b q h d, b k h d -> b h q k") * spec.scale + (0 if bias is None else bias)
    masked = products if hidden is None else products.masked_fill(hidden, -torch.inf)
    yield acts.claim("hook_attn_scores", "q . k * scale + bias, masked", masked)
    scores, pattern = acts["hook_attn_scores"], acts["hook_pattern"]
    yield acts.claim("hook_pattern", "softmax(scores)", torch.exp(scores - scores.logsumexp(-1, keepdim=True)))
    normed = pattern / pattern.sum(-1, keepdim=True)
    yield acts.claim("hook_pattern", "pattern / the sum of its row", normed, step=False)
    yield acts.claim("hook_z", "pattern v", einsum(pattern, v, "b h q k, b k h d -> b q h d"))


# -------------------------------------------------------------------- blocks


def block(acts: Acts, layer: Block | SideBySide, rope: Rope | None, hidden: Tensor | None) -> Part:
    """Claims about a block; returns the stream behind it: ``resid_post``, or in a block of kind ``post`` its norm."""
    pre, kind = acts["hook_resid_pre"], layer.spec.kind
    if kind == "post":
        return (yield from _post(acts, layer, hidden))
    normed, out = pre, torch.zeros_like(pre)
    yield from _head_inputs(acts, layer)
    parts = zip(*(_parts(layer, part) for part in ("attn", "ln1", "ls1")), strict=True)
    for side, ((name, attn), (ln, ln1), (_, scale)) in enumerate(parts):
        assert isinstance(attn, Attention)
        before = ln1 if kind in ("pre", "parallel") else nn.Identity()
        normed = yield from norm(acts.under(ln), before, pre)
        attended = yield from attention(acts.under(name), attn, _read(acts, layer, side, before, normed), rope, hidden)
        if kind == "res_post":
            attended = yield from norm(acts.under(ln), ln1, attended)
        out = out + attended * _gamma(scale)
    yield acts.claim("hook_attn_out", "z W_O + b_O, scaled", out)
    stream = pre + acts["hook_attn_out"]
    if layer.spec.mlp is not None:
        if kind != "parallel":
            yield acts.claim("hook_resid_mid", "resid_pre + attn_out", stream)
            stream = normed = acts["hook_resid_mid"]
        yield from _mlps(acts, layer, normed)
        stream = stream + acts["hook_mlp_out"]
    yield acts.claim("hook_resid_post", "resid_mid + mlp_out", stream)
    return acts["hook_resid_post"]


def _post(acts: Acts, layer: Block | SideBySide, hidden: Tensor | None) -> Part:
    assert isinstance(layer, Block)
    pre = acts["hook_resid_pre"]
    yield from _head_inputs(acts, layer)
    attended = yield from attention(
        acts.under("attn"), layer.attn, _read(acts, layer, 0, nn.Identity(), pre), None, hidden
    )
    yield acts.claim("hook_attn_out", "z W_O + b_O, scaled", attended * _gamma(layer.ls1))
    yield acts.claim("hook_resid_mid", "resid_pre + attn_out", pre + acts["hook_attn_out"])
    stream = yield from norm(acts.under("ln1"), layer.ln1, acts["hook_resid_mid"])
    out = yield from mlp(acts.under("mlp"), layer.mlp, stream)
    yield acts.claim("hook_mlp_out", "post W_out + b_out, scaled", out * _gamma(layer.ls2))
    yield acts.claim("hook_resid_post", "ln1(resid_mid) + mlp_out", stream + acts["hook_mlp_out"])
    return (yield from norm(acts.under("ln2"), layer.ln2, acts["hook_resid_post"]))


def _mlps(acts: Acts, layer: Block | SideBySide, x: Tensor) -> Claims:
    """Claims about a block's MLPs, which read ``x``, through a norm where there is one before them."""
    total = torch.zeros_like(x)
    norms = list(_parts(layer, "ln2")) or [("ln2", nn.Identity())]
    for (name, module), (ln, ln2), (_, scale) in zip(_parts(layer, "mlp"), norms, _parts(layer, "ls2"), strict=True):
        assert isinstance(module, MLP)
        normed = x
        if layer.spec.kind == "pre":
            normed = yield from norm(acts.under(ln), ln2, x)
        out = yield from mlp(acts.under(name), module, normed)
        if layer.spec.kind == "res_post":
            out = yield from norm(acts.under(ln), ln2, out)
        total = total + out * _gamma(scale)
    yield acts.claim("hook_mlp_out", "post W_out + b_out, scaled", total)


def _head_inputs(acts: Acts, layer: Block | SideBySide) -> Claims:
    """Claims about the inputs of single heads, in a pass that computes them."""
    pre = acts["hook_resid_pre"]
    for point, heads in _heads(layer):
        if point in acts:
            yield acts.claim(point, "resid_pre, once for each head", pre[:, :, None].expand(-1, -1, heads, -1))


def _read(acts: Acts, layer: Block | SideBySide, side: int, before: nn.Module, normed: Tensor) -> list[Tensor]:
    """What queries, keys and values of one attention are made of: ``[batch pos 1|head d_model]`` each.

    That is the norm of each head's input in a pass that computes these, with what hooks have added to the norm of the
    stream, and else the latter.

    Args:
        acts, layer: of the block.
        side: number of the attention among those side by side.
        before: the norm before it.
        normed: the norm of the stream as hooks left it.
    """
    change = (normed - _fused(before, acts["hook_resid_pre"])).unsqueeze(2)
    return [
        _fused(before, acts[point].chunk(layer.spec.n_parallel, 2)[side]) + change
        if point in acts
        else normed.unsqueeze(2)
        for point, _ in _heads(layer)
    ]


def _heads(layer: Block | SideBySide) -> list[tuple[str, int]]:
    """The points of the inputs of single heads, with the number of heads."""
    n, n_kv, sides = layer.spec.attn.n_heads, layer.spec.attn.n_kv_heads, layer.spec.n_parallel
    return [("hook_q_input", n * sides), ("hook_k_input", n_kv * sides), ("hook_v_input", n_kv * sides)]


def _fused(module: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(module, Norm):
        return x
    centred, scale = _centred(module, x)
    return centred / scale * module.weight + (0 if module.bias is None else module.bias)


def _parts(layer: Block | SideBySide, part: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield each of a block's parts of one kind with its path below the block: one, or several side by side."""
    modules = getattr(layer, part, None)
    if isinstance(modules, nn.ModuleList):
        yield from ((f"{part}.{index}", module) for index, module in enumerate(modules))
    elif modules is not None:
        yield part, modules


def _gamma(scale: nn.Module) -> Tensor | float:
    return scale.gamma if isinstance(scale, Scale) else 1.0
