"""The frozen path from the residual stream to a reading: what one unit of each direction at each token adds to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from prisma_core import InputError, NotApplicable, Result
from prisma_core.plugin import layer_of, taking_gradients
from prisma_lens.readouts import Readout, at_token


def covectors(cache: Any, reading: Readout, token: int | None = None) -> Iterator[Tensor]:
    """Yield for each direction of a readout what the stream at its end is multiplied with: ``[batch pos d_model]``.

    Scales of norms, the pattern of attention that pools and the output's length are frozen as they were in the pass.
    The reading is then linear in the stream, and its gradient is the same everywhere: it is taken at zero. So this
    holds for every pooling and norm whose path is linear, and never needs a stack of components.

    Args:
        cache: of one tower, with the scales of its last norms.
        reading: what is read.
        token: of a model that gives out every token, the one whose output is read; None for all.

    Raises:
        NotApplicable: the stream or the output is no sum of components.
        UnknownName: the cache lacks activations.
    """
    with taking_gradients():
        x = torch.zeros_like(_stream(cache), requires_grad=True)
        outputs = at_token(cache.project_stack(x[None])[0], token)
        if reading.unit_length:
            outputs = outputs / lengths(cache)[..., None]
        along = (outputs @ reading.vectors.to(outputs).T).flatten(0, -2).sum(0)
        readings = along.unbind()
    for one in readings:  # outside of the scope, for whoever takes them must not build a graph
        yield torch.autograd.grad(one, x, retain_graph=True)[0]


def constant(cache: Any, reading: Readout, token: int | None = None) -> Tensor:
    """Return the part of a reading that no component of the stream adds, with the readout's bias: ``[batch class]``."""
    outputs = at_token(cache.logit_constant(), token)
    if reading.unit_length:
        outputs = outputs / lengths(cache)[..., None]
    return outputs @ reading.vectors.to(outputs).T + reading.bias.to(outputs)


def probe_covectors(
    cache: Any, probe: Result, place: str | int = -1
) -> tuple[list[Tensor], Tensor, tuple[str, ...], int, Tensor]:
    """Return the same of a probe at one of its places: covectors, constant, labels, blocks before it, and its reading.

    Args:
        cache: of one tower.
        probe: the Result of ``probe``.
        place: its place, as label or number.

    Raises:
        InputError: it is no probe of the residual stream.
        NotApplicable: it reads every patch by itself.
    """
    name = probe.facts["names"][probe.index("place", place)]
    layer, tokens = layer_of(name), probe.facts["tokens"]
    if layer is None or not name.endswith(("hook_resid_pre", "hook_resid_post")):
        raise InputError(f"This probe reads {name}: attribution splits the stream, resid_pre or resid_post of a block.")
    if tokens == "patches":
        raise NotApplicable("This probe reads every patch by itself: logit_lens(model, images, probe) says what.")
    stream = _stream(cache)
    share = stream.new_zeros(stream.shape[1])
    share[cache.layout.slice(tokens) if tokens != "mean" else slice(None)] = 1
    weight, bias = (probe.tensors[f"{name}/{part}"].to(stream) for part in ("weight", "bias"))
    paths = [(share / share.sum())[:, None] * row for row in weight]
    end = layer + name.endswith("hook_resid_post")
    read = cache[name][:, share != 0].mean(1).to(stream) @ weight.T + bias
    return (
        [path.expand_as(stream) for path in paths],
        bias.expand(len(stream), -1),
        tuple(probe.facts["rows"]),
        end,
        read,
    )


def _stream(cache: Any) -> Tensor:
    """Return an addend of the stream in the stream's dtype, which is wider than what autocast makes of addends."""
    addend = cache["attn_out", -1]
    return addend.to(torch.promote_types(addend.dtype, cache.model.input_like.dtype))


def check_probe(probe: Result) -> None:
    """Refuse a result that is no probe's.

    Raises:
        InputError: it is another technique's, or lacks what ``probe`` writes.
    """
    if probe.technique != "probe":
        raise InputError(f"Expected the Result of probe, classes, texts or directions, got one of {probe.technique!r}.")
    if lacking := {"names", "tokens", "rows"} - {*probe.facts}:
        raise InputError(f"This Result of probe has no facts {', '.join(sorted(lacking))}: fit the probe again.")


def check_total(cache: Any, parts: Tensor, rest: Sequence[Tensor], reading: Tensor) -> None:
    """Refuse parts that are not what a reading is made of, beyond what dtypes round.

    Args:
        cache: what they were made from.
        parts: what should sum to the reading: ``[part ...]``.
        rest: with these.
        reading: of the pass itself.

    Raises:
        NotApplicable: a hook edited the stream, or what lies between parts and reading.
    """
    wide = torch.promote_types(parts.dtype, torch.float32)  # sums of many halves would round more than each half does
    total, size = parts.sum(0, dtype=wide), parts.abs().sum(0, dtype=wide) + reading.abs()
    for one in rest:
        total, size = total + one, size + one.abs()
    off = (total - reading).abs() > _rounding(cache) * size
    if bool(off.any()):
        raise NotApplicable(
            f"The components sum to {total[off][0]:.6g}, and the pass gave {reading.expand_as(off)[off][0]:.6g}: a "
            "hook edits the stream, what a layer adds to it or what reads it, or weights changed since the cache was "
            "taken. Edits of embeddings and of what components are made of can be attributed: q, k, v, pattern, z of "
            "heads, post of neurons."
        )


def _rounding(cache: Any) -> float:
    """Return the share of a sum's size that passes in the dtypes of a cache may be off by."""
    dtypes = {x.dtype for x in (*cache.values(), *cache.model.parameters()) if x.is_floating_point()}
    if dtypes == {torch.float64}:
        return 1e-9
    if dtypes <= {torch.float32, torch.float64} and not torch.is_autocast_enabled(cache.model.input_like.device.type):
        return 1e-3 if torch.get_float32_matmul_precision() == "highest" else 3e-2  # TF32 has ten bits
    return 0.04  # 5 steps of bfloat16, 41 of float16: of 2,400 random models, strained ones too, the worst had 3 and 12


def lengths(cache: Any) -> Tensor:
    """Return the length of each output, before a dual encoder divides by it: ``[batch]``."""
    return cache["hook_logits"].norm(dim=-1)
