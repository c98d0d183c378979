"""The mistakes."""

from __future__ import annotations

from dataclasses import replace

import torch
from prisma_conformance import Images
from torch import nn

from prisma_core import HookedViT, ModelSpec
from prisma_core.maps.places import HookMap, Place, Row
from prisma_core.spec import NormSpec

from .mutants import (
    CASES,
    Cutting,
    Doubled,
    Halving,
    Ignoring,
    Mutant,
    Rounding,
    Shared,
    Silent,
    Softened,
    Squared,
    Sticky,
    Twice,
    Uncompiled,
    add_in_place,
    block,
    blocks,
    detach_mlp,
    exchange,
    ignoring,
    parameters,
    part,
    point,
    scale_after_hook,
    swap_queries_and_keys,
    transpose_grid,
    unspoken_point,
)


def _rows_exchanged(table: HookMap) -> HookMap:
    other = {
        "blocks.{l}.hook_resid_pre": "blocks.{l}.hook_resid_mid",
        "blocks.{l}.hook_resid_mid": "blocks.{l}.hook_resid_pre",
    }
    return replace(table, rows=tuple(replace(row, hook=other.get(row.hook, row.hook)) for row in table.rows))


def _unfuse(upstream: nn.Module) -> None:
    for module in upstream.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not module.fused_attn


def _without_antialias(spec: ModelSpec) -> ModelSpec:
    assert spec.embed.interpolation is not None
    interpolation = spec.embed.interpolation.model_copy(update={"antialias": False})
    return part("embed", interpolation=interpolation)(spec)


def _forget(model: HookedViT) -> None:
    assert model.origin is not None
    model.origin.persistent.remove("norm.bias")
    model.origin.upstream["norm.bias"] = model.ln_final.bias.detach().clone()


def _images(**update: object):
    def images(model: nn.Module) -> Images:
        right = CASES["plain"].images
        assert right is not None
        ours, reference = right(model)
        return Images(ours.model_copy(update=update), reference)

    return images


def _forward(model: HookedViT) -> None:
    own = model.blocks[0].mlp.forward
    model.blocks[0].mlp.forward = lambda x: 2 * own(x)


def _random_bias(model: HookedViT) -> None:
    for bias in parameters(model, "ln_final.bias"):
        bias.normal_()


LOGITS = "float64: logits differ by"

MUTANTS = [
    # ------------------------------------------------------------ numbers
    Mutant(
        "tanh gelu for erf gelu",
        "parity.logits",
        LOGITS,
        spec=block("mlp", act="gelu_tanh"),
        remedy="mlp.act='gelu'",
    ),
    Mutant(
        "quick gelu for gelu",
        "parity.logits",
        LOGITS,
        spec=block("mlp", act="quick_gelu"),
        remedy="mlp.act='gelu'",
    ),
    Mutant(
        "gelu for silu",
        "parity.logits",
        LOGITS,
        case="rotary",
        spec=block("mlp", act="gelu"),
        remedy="mlp.act='silu'",
    ),
    Mutant("torch's default eps", "parity.logits", LOGITS, spec=part("ln_final", eps=1e-5), remedy="eps="),
    Mutant("one eps for all", "parity.logits", LOGITS, spec=blocks(ln1=NormSpec(eps=1e-6)), remedy="eps="),
    Mutant(
        "rms for layer norm",
        "parity.logits",
        LOGITS,
        case="averaged",
        spec=part("ln_pool", kind="rms"),
        table=ignoring("fc_norm.bias"),
    ),
    Mutant("q and k swapped", "parity.logits", LOGITS, edit=swap_queries_and_keys, remedy="queries and keys exchanged"),
    Mutant(
        "attention scale 1",
        "parity.logits",
        LOGITS,
        spec=block("attn", scale=1.0),
        remedy="attn.scale=0.353553 (it is 1)",
    ),
    Mutant(
        "layer scale dropped",
        "parity.logits",
        LOGITS,
        spec=blocks(attn_scale=False),
        table=ignoring("blocks.{l}.ls1.gamma"),
    ),
    Mutant(
        "registers before the class token",
        "parity.logits",
        LOGITS,
        edit=lambda model: [x.copy_(x.detach().clone().roll(1, 0)) for x in parameters(model, "embed.prefix")],
        remedy="[reg_token, cls_token] -> embed.prefix",
    ),
    Mutant(
        "an output bias dropped",
        "parity.logits",
        LOGITS,
        edit=lambda m: [x.zero_() for x in parameters(m, "mlp.fc_out.bias")],
    ),
    Mutant(
        "rope halves for neighbours",
        "parity.logits",
        LOGITS,
        case="rotary",
        spec=part("rope", layout="half"),
        remedy="rope.layout='interleaved'",
    ),
    Mutant(
        "gate and input of the MLP exchanged",
        "parity.logits",
        LOGITS,
        case="rotary",
        edit=lambda m: [torch.utils.swap_tensors(b.mlp.fc_gate.weight, b.mlp.fc_in.weight) for b in m.blocks],
    ),
    Mutant(
        "registers averaged in",
        "parity.logits",
        LOGITS,
        case="averaged",
        spec=part("pool", with_prefix=True),
        remedy="pool.with_prefix=False",
    ),
    Mutant(
        "the class token for the mean",
        "parity.logits",
        LOGITS,
        case="averaged",
        spec=part("pool", kind="token"),
        remedy="pool.kind='avg'",
    ),
    Mutant("patch grid transposed", "parity.logits", LOGITS, edit=transpose_grid),
    Mutant(
        "patch kernels transposed",
        "parity.logits",
        LOGITS,
        edit=lambda m: [x.copy_(x.detach().clone().transpose(2, 3)) for x in parameters(m, "embed.proj.weight")],
        remedy="patch kernels transposed",
    ),
    Mutant(
        "positions resized without antialiasing",
        "parity.logits",
        LOGITS,
        spec=_without_antialias,
        remedy="embed.interpolation.antialias=True (it is False)",
    ),
    # ------------------------------------------------------------ activations
    Mutant(
        "scores held after the softmax",
        "parity.hooks",
        "attn.hook_attn_scores differs by",
        edit=point("blocks.0.attn.hook_attn_scores", Softened),
    ),
    Mutant(
        "two rows of the hook map exchanged",
        "parity.hooks",
        "blocks.0.hook_resid_pre differs by",
        hooks=_rows_exchanged,
    ),
    Mutant(
        "an empty hook map",
        "parity.hooks",
        "blocks.0.hook_resid_pre is not in the hook map",
        hooks=lambda table: replace(table, rows=()),
    ),
    Mutant(
        "a row that reads nothing",
        "parity.hooks",
        "blocks.0.ln1.hook_scale: upstream never passed",
        hooks=lambda t: replace(t, rows=(*t.rows, Row(Place("head", "softmax"), "blocks.{l}.ln1.hook_scale"))),
    ),
    Mutant(
        "attn_out held before layer scale",
        "algebra",
        "hook_resid_mid = resid_pre + attn_out: off by",
        edit=scale_after_hook,
    ),
    Mutant(
        "keys held as values",
        "algebra",
        "hook_k = x W_K + b_K, normed: off by",
        edit=exchange("blocks.0.attn.hook_k", "blocks.0.attn.hook_v", "names"),
    ),
    Mutant(
        "queries held before they are turned",
        "algebra",
        "hook_rot_q = q turned by its position: off by",
        case="rotary",
        edit=exchange("blocks.0.attn.hook_q", "blocks.0.attn.hook_rot_q", "names"),
    ),
    Mutant(
        "a variance for a scale, of queries",
        "algebra",
        "blocks.1.attn.q_norm.hook_scale = sqrt(mean square of centred x + eps): off by",
        case="pooled",
        edit=point("blocks.1.attn.q_norm.hook_scale", Squared),
    ),
    Mutant(
        "a variance for a scale, behind pooling",
        "algebra",
        "ln_pool.hook_scale = sqrt(mean square of centred x + eps): off by",
        case="averaged",
        edit=point("ln_pool.hook_scale", Squared),
    ),
    Mutant(
        "a pooling pattern that is no average",
        "algebra",
        "pool.attn.hook_pattern = pattern / the sum of its row: off by",
        case="pooled",
        edit=point("pool.attn.hook_pattern", Doubled),
    ),
    Mutant(
        "what a head returns, squared",
        "algebra",
        "blocks.0.attn.hook_result = z W_O, of each head: off by",
        edit=point("blocks.0.attn.hook_result", Squared),
    ),
    Mutant(
        "results of heads, half of an edit",
        "algebra",
        "blocks.0.hook_attn_out = z W_O + b_O, scaled, with every hook point edited: off by",
        edit=point("blocks.0.attn.hook_result", Halving),
    ),
    Mutant(
        "inputs of heads, half of an edit",
        "algebra",
        "blocks.1.attn.hook_k = x W_K + b_K, normed, with every hook point edited: off by",
        edit=point("blocks.1.hook_k_input", Halving),
    ),
    Mutant(
        "a hook point that nothing speaks of",
        "algebra",
        "blocks.{l}.hook_extra is in no hook map and no equation",
        edit=unspoken_point,
    ),
    # ------------------------------------------------------------ gradients
    Mutant("a gradient cut off", "parity.gradients", "the gradient by the input differs by", edit=detach_mlp),
    # ------------------------------------------------------------ weights
    Mutant(
        "an ignored tensor that matters",
        "weights.accounted",
        "ignores tensors that matter, among blocks.0.attn.proj.bias",
        table=ignoring("blocks.{l}.attn.proj.bias", "blocks.{l}.attn.out.bias"),
    ),
    Mutant("a tensor filled at random", "weights.accounted", "ln_final.bias is filled at random", edit=_random_bias),
    Mutant(
        "upstream's kernel switched over",
        "weights.accounted",
        "adapting changed upstream's blocks.0.attn.fused_attn",
        before=_unfuse,
    ),
    Mutant(
        "upstream's weights touched",
        "weights.accounted",
        "adapting changed upstream's head.bias",
        before=lambda m: m.head.bias.data.mul_(2),
    ),
    Mutant("a tensor that export forgets", "weights.roundtrip", "export lacks norm.bias", edit=_forget),
    Mutant(
        "a tensor that comes back changed",
        "weights.roundtrip",
        "head.weight comes back changed",
        edit=lambda m: m.head.weight.mul_(2),
    ),
    # ------------------------------------------------------------ hooks
    Mutant(
        "a hook whose return is ignored",
        "hooks.live",
        "an edit at blocks.0.mlp.hook_post does not reach the output",
        edit=point("blocks.0.mlp.hook_post", Ignoring),
    ),
    Mutant(
        "a hook point that never fires",
        "hooks.live",
        "blocks.1.attn.hook_k fires 0 times",
        edit=point("blocks.1.attn.hook_k", Silent),
    ),
    Mutant(
        "a derived point that never fires",
        "hooks.live",
        "blocks.1.attn.hook_result fires 0 times",
        edit=point("blocks.1.attn.hook_result", Silent),
    ),
    Mutant(
        "a hook point that fires twice",
        "hooks.live",
        "blocks.1.hook_mlp_out fires 2 times",
        edit=point("blocks.1.hook_mlp_out", Twice),
    ),
    Mutant(
        "looking changes the number",
        "hooks.live",
        "changes nothing at hook_resid_mid moves the logits",
        edit=point("blocks.0.hook_resid_mid", Rounding),
    ),
    Mutant(
        "a hook point that stops gradients",
        "hooks.live",
        "no gradient reaches hook_embed",
        edit=point("blocks.1.hook_resid_mid", Cutting),
    ),
    Mutant(
        "a failed hook leaves something behind",
        "hooks.live",
        "after a hook at hook_embed has failed, logits stay changed",
        edit=point("hook_embed", Sticky),
    ),
    Mutant(
        "a cache that is edited later", "hooks.live", "changes hook_full_embed, cached before it", edit=add_in_place
    ),
    Mutant(
        "hook points out of order",
        "hooks.live",
        "blocks.0.attn.hook_q fires where hook_points() says blocks.0.attn.hook_k",
        edit=exchange("blocks.0.attn.hook_q", "blocks.0.attn.hook_k", "order"),
    ),
    # ------------------------------------------------------------ the rest
    Mutant(
        "a default for what the module says",
        "spec.audit",
        "is neither read nor ignored with a reason",
        reads=lambda r: r.record.discard("blocks.1.norm2.eps"),
    ),
    Mutant("another crop", "preprocess", "differs by", images=_images(crop=1.0)),
    Mutant("another filter", "preprocess", "differs by", images=_images(interpolation="bilinear")),
    Mutant("another mean", "preprocess", "differs by", images=_images(mean=(0.5, 0.5, 0.5))),
    Mutant("blue first", "preprocess", "differs by", images=_images(order="bgr")),
    Mutant("a fact that the spec does not hold", "save.load", "the logits come back changed", edit=_forward),
    Mutant(
        "state kept on a hook point",
        "threads",
        "sees what another thread's hooks do",
        edit=point("blocks.0.hook_resid_post", Shared),
    ),
    Mutant(
        "hooks ignored once compiled",
        "compile",
        "the compiled model ignores an edit",
        case="single",
        edit=point("blocks.0.hook_resid_post", Uncompiled),
    ),
]
