"""Same numbers: logits, activations, gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.devices import HALF
from prisma_conformance.recording import Recorder
from prisma_conformance.registry import Finding, register
from prisma_conformance.report.results import Precision
from prisma_conformance.subject import Inputs, Subject, differentiable, typical, worst
from prisma_core.maps.places import INSIDE, HookMap
from prisma_core.plugin.adapter import MapAdapter
from prisma_core.transformer import ZooModel
from prisma_core.zoo import tensors_of


@register("parity.logits", "logits equal upstream's in float64, and err no more than upstream does in other dtypes")
@torch.no_grad()
def logits(subject: Subject) -> Finding:
    exact = subject.pair()
    errors: dict[str, float] = {}
    for size in subject.sizes():
        for batch in (1, 3) if size == subject.sizes()[0] else (2,):
            inputs = subject.inputs(batch, size)
            theirs = subject.forward(exact.upstream, *inputs)
            if theirs.numel() > 1 and not float(theirs.std()) > 0:
                return Finding(problems=("upstream's output is constant or NaN: these weights prove nothing",))
            errors[f"batch {batch} at {'x'.join(map(str, size))}"] = worst(exact.model(*inputs), theirs)
    problems: list[str] = []
    precisions: list[Precision] = []
    for dtype, device in subject.precisions():
        precision, wrong = _errs_as_upstream(subject, dtype, device)
        problems += wrong
        precisions.append(precision)
    where = max(errors, key=lambda key: errors[key])
    detail = "; ".join([f"float64: {len(errors)} inputs, worst {where}", *map(str, precisions)])
    if errors[where] > tolerances.FLOAT64:
        problems.append(f"float64: logits differ by {errors[where]:.1e} of their standard deviation, {where}")
    return Finding(errors[where], tolerances.FLOAT64, tuple(problems), detail, tuple(precisions))


def _errs_as_upstream(subject: Subject, dtype: torch.dtype, device: torch.device) -> tuple[Precision, list[str]]:
    precision = Precision(dtype=str(dtype).removeprefix("torch."), device=device.type)
    upstream = subject.upstream(dtype, device)
    model, inputs = (
        subject.make(subject.adapter, upstream),
        subject.inputs(tolerances.OWN_ERROR_INPUTS, None, dtype, device),
    )
    # Against float64 on the very numbers that this dtype holds: the error of the arithmetic, not of the rounding.
    exact = subject.upstream(dtype, device).double()
    truth = subject.forward(exact, *(x.double() if x.is_floating_point() else x for x in inputs))
    del exact
    try:
        theirs = subject.forward(upstream, *inputs)
    except NotImplementedError as error:  # torch has no such kernel there
        return precision.model_copy(update={"skipped": f"upstream cannot run in it: {error}"}), []
    if not bool(torch.isfinite(theirs).all()):
        return precision.model_copy(update={"skipped": "upstream's own output is not finite in it"}), []
    ours, own = model(*inputs), typical(theirs, truth)
    found = {"error": typical(ours, truth), "upstream": own, "equal": torch.equal(ours, theirs)}
    precision = precision.model_copy(update=found)
    problems: list[str] = []
    if not (found["equal"] or found["error"] <= tolerances.OWN_ERROR_FACTOR * own):
        problems.append(f"{precision}, more than {tolerances.OWN_ERROR_FACTOR} times that")
    if dtype in HALF:
        problems += _shown(subject, model, inputs, truth, own)
    return precision, problems


def _shown(subject: Subject, model: ZooModel, inputs: Inputs, truth: Tensor, own: float) -> list[str]:
    """Say what goes wrong in half precision while every activation is kept."""
    shown, cache = model.run_with_cache(*inputs)
    error = typical(shown, truth)
    problems: list[str] = []
    if not error <= tolerances.SHOWN_ERROR_FACTOR * own:
        told = f"{shown.dtype} errs by {error:.1e} while everything is cached, upstream by {own:.1e}"
        problems.append(f"{told}: more than {tolerances.SHOWN_ERROR_FACTOR} times that")
    if not isinstance(subject.adapter, MapAdapter):  # what passes inside upstream's own code has whatever dtype it has
        problems += [f"{name} is cached as {x.dtype}" for name, x in cache.items() if x.dtype != shown.dtype]
    return problems


@register("parity.hooks", "every activation in the hook map equals upstream's at that place, at every layer")
@torch.no_grad()
def hooks(subject: Subject) -> Finding:
    found = compare(subject)
    points = subject.pair().model.hook_points()
    plain = [name for name, point in points.items() if not point.derived]
    problems = [f"{name}: {reason}" for name, reason in found.unread.items()]
    wrong = {name: error for name, error in found.errors.items() if not error <= tolerances.FLOAT64}
    problems += [f"{name} differs by {error:.1e}" for name, error in wrong.items()]
    must = bool if isinstance(subject.adapter, MapAdapter) else _must_map
    # What an upstream cannot show (a norm's scale inside its kernel) is proven by algebra from what it can.
    problems += [f"{name} is not in the hook map" for name in plain if name not in found.errors and must(name)]
    uncovered = sorted({_family(name) for name in plain if name not in found.errors})
    detail = f"{len(found.errors)} of {len(plain)} hook points compared"
    if uncovered:
        detail += f"; upstream shows no place for {', '.join(uncovered)}"
    return Finding(max(found.errors.values(), default=float("inf")), tolerances.FLOAT64, tuple(problems), detail)


def _must_map(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in ("hook_resid_pre", "hook_resid_post", "hook_logits")


def _family(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{l}.", name, count=1)


class Comparison:
    """Activations beside upstream's: the error at each hook point in firing order, and rows that read nothing."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.unread: dict[str, str] = {}


@torch.no_grad()
def compare(subject: Subject) -> Comparison:
    """Return how far each mapped activation is from upstream's."""
    upstream, model = subject.pair()
    passes = subject.passes()
    found = Comparison()
    order = {name: index for index, name in enumerate(model.hook_points())}
    for table, scope in _tables(subject, upstream):
        sizes = {**table.sizes, "batch": len(passes.inputs[0])}
        rows = [row for row in table.bound(list(passes.acts)) if row.place.side not in INSIDE]
        with scope, Recorder(upstream, [row.place for row in rows]) as seen:
            output = subject.forward(upstream, *passes.inputs)
        if "hook_logits" in passes.acts:  # the main output, wherever a case reads it
            found.errors["hook_logits"] = max(
                worst(passes.acts["hook_logits"], output), found.errors.get("hook_logits", 0.0)
            )
        for row in sorted(rows, key=lambda row: order[row.hook]):
            theirs = seen.get(row.place)
            if theirs is None:
                found.unread[row.hook] = f"upstream never passed {row.place}"
            else:
                error = worst(passes.acts[row.hook], row.read(theirs, sizes))
                found.errors[row.hook] = max(error, found.errors.get(row.hook, 0.0))
    found.errors = {
        name: found.errors[name] for name in order if name in found.errors
    }  # the first that errs comes first
    return found


def _tables(subject: Subject, upstream: nn.Module) -> list[tuple[HookMap, AbstractContextManager[None]]]:
    """Return which places to read, each table with the state upstream has to be in."""
    adapter = subject.adapter
    table = subject.table(upstream)
    if not isinstance(adapter, MapAdapter):
        return [(table, adapter.explicit(upstream))]
    # The model runs as upstream does: first the places where it does, then what opening a kernel is to equal.
    return [(table, nullcontext()), (subject.table(upstream, "elsewhere"), adapter.explicit(upstream))]


@register("parity.gradients", "gradients by the input and by every upstream weight equal upstream's, through the map")
def gradients(subject: Subject) -> Finding:
    upstream, model = subject.pair()
    inputs = subject.inputs(2)
    theirs = subject.forward(upstream, *(given := differentiable(inputs)))
    weights = torch.randn(theirs.shape, generator=subject.generator(2)).to(theirs)
    groups: dict[int, list[str]] = {}
    for name, parameter in upstream.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    parameters = dict(upstream.named_parameters())
    wanted = _grads(theirs, weights, [*_floats(given), *parameters.values()])

    leaves = tensors_of(model)
    active = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
    ours = model(*(mine := differentiable(inputs)))
    got = _grads(ours, weights, [*_floats(mine), *active.values()])
    n = len(_floats(mine))
    if any(grad is None for grad in (*got[:n], *wanted[:n])):
        return Finding(problems=("no gradient reaches the input",))
    canonical: dict[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in leaves.items()}
    canonical |= {name: grad for name, grad in zip(active, got[n:], strict=True) if grad is not None}
    assert model.origin is not None
    pulled = model.origin.map.pull_back(tensors_of(upstream), canonical)

    errors: dict[str, float] = {}
    for ours, theirs in zip(got[:n], wanted[:n], strict=True):
        assert ours is not None
        assert theirs is not None
        errors["the input"] = worst(ours, theirs, float(theirs.abs().max()))
    scale = max((float(grad.abs().max()) for grad in wanted[n:] if grad is not None and grad.numel()), default=1.0)
    for (name, parameter), grad in zip(parameters.items(), wanted[n:], strict=True):
        if not parameter.numel():
            continue  # a table of no tokens has no gradient
        theirs = torch.zeros_like(parameter) if grad is None else grad
        summed = [pulled[twin] for twin in groups[id(parameter)] if twin in pulled]
        mapped = torch.stack(summed).sum(0) if summed else torch.zeros_like(parameter)
        # A gradient that is zero in truth (the bias of keys) is only rounding: measure it by the others.
        errors[name] = worst(mapped, theirs, max(float(theirs.abs().max()), 1e-3 * scale))
    wrong = {name: error for name, error in errors.items() if not error <= tolerances.GRADIENT}
    problems = tuple(f"the gradient by {name} differs by {error:.1e}" for name, error in wrong.items())
    return Finding(max(errors.values()), tolerances.GRADIENT, problems, f"the input and {len(parameters)} weights")


def _floats(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs if x.is_floating_point()]


def _grads(output: Tensor, weights: Tensor, by: Sequence[Tensor]) -> Sequence[Tensor | None]:
    # torch's stubs leave out that what is not reached comes back as None.
    return torch.autograd.grad((output * weights).sum(), list(by), allow_unused=True)
