"""Checks of hooked upstreams, where they differ from those of canonical models."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.checks.equations import MapEquations
from prisma_conformance.checks.tensors import changes, fingerprint
from prisma_conformance.finding import Finding
from prisma_conformance.measure import worst
from prisma_conformance.subject import Subject, differentiable
from prisma_core import HookedUpstream, tensors_of
from prisma_core.plugin import HookError, NotApplicable

# -------------------------------------------------------------------- weights


@torch.no_grad()
def accounted(subject: Subject) -> Finding:
    """Compare the model's tensors with upstream's, and upstream with what it was before adapting."""
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
    """Compare gradients by the input and by every weight, ours while every hook point is cached with its graph."""
    upstream, model = subject.upstream(), subject.make(subject.adapter, subject.upstream())
    assert isinstance(model, HookedUpstream)
    inputs = subject.inputs(2)
    grads: list[list[Tensor | None]] = []
    for module, run in ((upstream, subject.forward), (model.upstream, _caching(model))):
        output = run(module, *(leaves := differentiable(inputs)))
        weights = torch.randn(output.shape, generator=subject.generator(2)).to(output)
        tensors = [*(x for x in leaves if x.is_floating_point()), *module.parameters()]
        grads.append(list(torch.autograd.grad((output * weights).sum(), tensors, allow_unused=True)))
    names = [f"input {i}" for i, x in enumerate(inputs) if x.is_floating_point()]
    names += [name for name, _ in upstream.named_parameters()]
    scale = max((float(grad.abs().max()) for grad in grads[0] if grad is not None), default=1.0)
    errors: dict[str, float] = {}
    problems: list[str] = []
    for name, theirs, ours in zip(names, *grads, strict=True):
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
    """Evaluate the equations that hold in every model with such hook points, also while each of these is edited."""
    equations = MapEquations(subject)
    errors, problems = equations.evaluate(equations.everywhere)
    if not errors and not problems:
        raise NotApplicable("no equation holds between the hook points of this model")
    kinds = {re.sub(r"\d+", "{}", text) for text in errors}
    detail = f"{len(errors)} equations of {len(kinds)} kinds"
    return Finding(max(errors.values(), default=0.0), tolerances.FLOAT64, tuple(problems), detail)


# -------------------------------------------------------------------- compiling


@torch.no_grad()
def compiled(subject: Subject) -> Finding:
    """Compile the model without hooks; a hook in a compiled one must raise."""
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
