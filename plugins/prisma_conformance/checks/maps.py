"""Checks of hooked upstreams, where they differ from those of canonical models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.checks.tensors import changes, fingerprint
from prisma_conformance.finding import Finding
from prisma_conformance.measure import worst
from prisma_conformance.subject import Subject, differentiable
from prisma_core import HookContext, HookedUpstream, tensors_of
from prisma_core.plugin import HookError, MapAdapter, NotApplicable, Reader

Equation = tuple[str, Tensor, Tensor]  # its text and its two sides


def _model(subject: Subject) -> HookedUpstream:
    model = subject.pair().model
    assert isinstance(model, HookedUpstream)
    return model


# -------------------------------------------------------------------- weights


@torch.no_grad()
def accounted(subject: Subject) -> Finding:
    """The model has upstream's very tensors, and adapting leaves upstream as it was."""
    upstream = subject.upstream()
    before, state = fingerprint(upstream), {name: tensor.clone() for name, tensor in tensors_of(upstream).items()}
    model = subject.make(subject.adapter, upstream)
    assert isinstance(model, HookedUpstream)
    model.run_with_hooks(*subject.inputs(), hooks={name: lambda x, at: x * 0.5 for name in model.hook_points()})
    problems = [f"adapting or running changed {what}" for what in changes(upstream, before, state)]
    ours = tensors_of(model.upstream)
    problems += [f"{name} differs" for name in state if name not in ours or not torch.equal(ours[name], state[name])]
    theirs = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(upstream).values() if tensor.numel()}
    shared = [name for name, x in ours.items() if x.numel() and x.untyped_storage().data_ptr() in theirs]
    problems += [f"{name} is shared with upstream" for name in shared]
    return Finding(problems=tuple(problems), detail=f"{len(state)} tensors, upstream's own; there is no weight map")


def gradients(subject: Subject) -> Finding:
    """Gradients by the input and by every weight are upstream's while every hook point is cached, graph and all."""
    upstream, model = subject.upstream(), subject.make(subject.adapter, subject.upstream())
    assert isinstance(model, HookedUpstream)
    inputs = subject.inputs(2)
    found: list[list[Tensor | None]] = []
    for module, run in ((upstream, subject.forward), (model.upstream, _caching(model))):
        output = run(module, *(given := differentiable(inputs)))
        weights = torch.randn(output.shape, generator=subject.generator(2)).to(output)
        leaves = [*(x for x in given if x.is_floating_point()), *module.parameters()]
        found.append(list(torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True)))
    names = [*(f"input {i}" for i in range(len(found[0]))), *(name for name, _ in upstream.named_parameters())]
    names = names[-len(found[0]) :]
    scale = max((float(grad.abs().max()) for grad in found[0] if grad is not None), default=1.0)
    errors: dict[str, float] = {}
    problems: list[str] = []
    for name, theirs, ours in zip(names, *found, strict=True):
        if (theirs is None) != (ours is None):
            problems.append(f"the gradient by {name} is lost or invented")
        elif theirs is not None and ours is not None:
            errors[name] = worst(ours, theirs, max(float(theirs.abs().max()), 1e-3 * scale))
    problems += [f"the gradient by {n} differs by {e:.1e}" for n, e in errors.items() if not e <= tolerances.GRADIENT]
    return Finding(max(errors.values()), tolerances.GRADIENT, tuple(problems), f"{len(errors)} tensors")


def _caching(model: HookedUpstream) -> Callable[..., Tensor]:
    def run(upstream: nn.Module, *inputs: Tensor) -> Tensor:
        with model.caching(detach=False):
            return model(*inputs)

    return run


# -------------------------------------------------------------------- equations


@torch.no_grad()
def algebra(subject: Subject) -> Finding:
    """What activations are to each other, as far as it holds in every model, and what the adapter says.

    What is said of the residual stream has to hold while the stream is edited too: a place that only some of what
    follows reads (a norm's input) shows the stream, and is none.
    """
    model, passes = _model(subject), subject.passes()
    claims = [claim for _, claim in _claims(passes.acts, passes.logits)]
    if isinstance(subject.adapter, MapAdapter):
        claims += subject.adapter.equations(Reader(subject.upstream()), passes.acts)
    for kind in ("resid_pre", "resid_mid", "resid_post"):
        names = [name for name in model.hook_points() if name.endswith(f"hook_{kind}")]
        if names:
            noise = _noise(subject)
            logits, cache = model.run_with_cache(*passes.inputs, hooks=dict.fromkeys(names, noise))
            made = _claims(cache.store, logits)
            claims += [(f"{text}, with {kind} edited", *sides) for of, (text, *sides) in made if of not in ("", kind)]
    errors: dict[str, float] = {}
    for claim, ours, theirs in claims:
        errors[claim] = max(errors.get(claim, 0.0), worst(ours, theirs))
    if not errors:
        raise NotApplicable("no equation holds between the hook points of this model")
    problems = tuple(f"{name}: off by {error:.1e}" for name, error in errors.items() if not error <= tolerances.FLOAT64)
    kinds = {re.sub(r"\d+", "{}", claim) for claim in errors}
    return Finding(max(errors.values()), tolerances.FLOAT64, problems, f"{len(errors)} equations of {len(kinds)} kinds")


def _noise(subject: Subject) -> Callable[[Tensor, HookContext], Tensor]:
    generator = subject.generator(8)

    def hook(x: Tensor, at: HookContext) -> Tensor:
        return x + torch.randn(x.shape, generator=generator).to(x)

    return hook


def _claims(acts: Mapping[str, Tensor], logits: Tensor) -> Iterator[tuple[str, Equation]]:
    """Yield what holds in every model, next to the kind of activation of the stream it says something of."""
    if "hook_logits" in acts:
        yield "", ("hook_logits is the output", acts["hook_logits"], logits)
    for at in dict.fromkeys(name.rpartition(".")[0] for name in acts):
        normed = f"{at}.ln3.hook_normalized" in acts
        yield from _stream(at, {name: acts.get(f"{at}.hook_{name}") for name in _STREAM}, normed)
        for claim in _attention(at, {name: acts.get(f"{at}.hook_{name}") for name in _ATTENTION}):
            yield "", claim
    for name, x in acts.items():
        if (before := re.fullmatch(r"(.*blocks\.)(\d+)\.hook_resid_pre", name)) is not None:
            previous = acts.get(f"{before[1]}{int(before[2]) - 1}.hook_resid_post")
            if previous is not None:
                yield "resid_pre", (f"{name} = what the block before leaves", x, previous)


_STREAM = ("resid_pre", "shortcut", "attn_out", "resid_mid", "mlp_out", "resid_post")
_ATTENTION = ("attn_scores", "pattern", "v", "z")


def _stream(at: str, x: Mapping[str, Tensor | None], normed: bool) -> Iterator[tuple[str, Equation]]:
    pre, shortcut, attn_out, mid, mlp_out, post = (x[name] for name in _STREAM)
    kept, what = (pre, "resid_pre") if shortcut is None else (shortcut, "shortcut")
    if kept is not None and attn_out is not None and mid is not None:
        made = kept + attn_out.reshape(kept.shape)
        yield "resid_mid", (f"{at}: resid_mid = {what} + attn_out", mid, made)
    if mid is None and attn_out is None:
        mid = kept  # a block with one branch
    else:
        what = "resid_mid"
    if mid is not None and mlp_out is not None and post is not None and not normed:
        made = mid + mlp_out.reshape(mid.shape)  # some keep rows and columns apart, some do not
        yield "resid_post", (f"{at}: resid_post = {what} + mlp_out", post, made)


def _attention(at: str, x: Mapping[str, Tensor | None]) -> Iterator[Equation]:
    scores, pattern, v, z = (x[name] for name in _ATTENTION)
    if pattern is None:
        return
    yield f"{at}: pattern rows sum to 1", pattern.sum(-1) + pattern[..., 0], 1 + pattern[..., 0]
    if scores is not None:
        yield f"{at}: pattern = softmax(scores)", pattern, torch.exp(scores - scores.logsumexp(-1, keepdim=True))
    if v is not None and z is not None:  # [... pos head d_head] beside [... head query_pos key_pos]
        yield f"{at}: pattern v = z", z, torch.einsum("...hqk,...khd->...qhd", pattern, v)


# -------------------------------------------------------------------- compiling


@torch.no_grad()
def compiled(subject: Subject) -> Finding:
    """The model without hooks compiles whole; a hook in a compiled one is refused, not ignored."""
    model, inputs = subject.pair(torch.float32).model, subject.inputs(dtype=torch.float32)
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True)
    error = worst(fast(*inputs), model(*inputs))
    problems: list[str] = []
    with model.hooks({next(iter(model.hook_points())): lambda x, at: x * 0.5}):
        try:
            fast(*inputs)
        except (HookError, RuntimeError):
            pass
        else:
            problems.append("a hook in the compiled model is ignored")
    return Finding(error, 2e-5, tuple(problems), "the compiler fuses and reorders in float32")


__all__ = ["accounted", "algebra", "compiled", "gradients"]
