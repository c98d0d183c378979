"""Same numbers: logits, activations, gradients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prisma_conformance import tolerances
from prisma_conformance.checks.equations import MapEquations
from prisma_conformance.devices import HALF
from prisma_conformance.finding import Finding
from prisma_conformance.gradients import pull_back
from prisma_conformance.measure import typical, worst
from prisma_conformance.recording import Recorder
from prisma_conformance.report.results import Precision
from prisma_conformance.subject import Inputs, Subject, differentiable
from prisma_core import ZooModel, tensors_of


@torch.no_grad()
def logits(subject: Subject) -> Finding:
    """Compare logits: float64 within a bound, other dtypes with upstream's own error."""
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
        few, many = tolerances.OWN_ERROR_INPUTS
        precision, excesses = _errs_as_upstream(subject, dtype, device, few)
        if excesses:
            precision, excesses = _errs_as_upstream(subject, dtype, device, many)
        problems += excesses
        precisions.append(precision)
    where = max(errors, key=lambda key: errors[key])
    detail = "; ".join([f"float64: {len(errors)} inputs, worst {where}", *map(str, precisions)])
    if errors[where] > tolerances.FLOAT64:
        problems.append(f"float64: logits differ by {errors[where]:.1e} of their standard deviation, {where}")
    return Finding(errors[where], tolerances.FLOAT64, tuple(problems), detail, tuple(precisions))


def _errs_as_upstream(
    subject: Subject, dtype: torch.dtype, device: torch.device, n: int
) -> tuple[Precision, list[str]]:
    """Compare the error of our logits with the error of upstream's over ``n`` inputs, in one dtype on one device."""
    precision = Precision(dtype=str(dtype).removeprefix("torch."), device=device.type)
    upstream = subject.upstream(dtype, device)
    model, inputs = (
        subject.make(subject.adapter, upstream),
        subject.inputs(n, None, dtype, device),
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
    ours = model(*inputs)
    error, bound, equal = typical(ours, truth), typical(theirs, truth), torch.equal(ours, theirs)
    precision = precision.model_copy(update={"error": error, "upstream": bound, "equal": equal})
    problems: list[str] = []
    if not (equal or error <= tolerances.OWN_ERROR_FACTOR * bound):
        problems.append(f"{precision}, more than {tolerances.OWN_ERROR_FACTOR} times that")
    if dtype in HALF:
        problems += _cached_in_half(subject, model, inputs, truth, bound)
    return precision, problems


def _cached_in_half(subject: Subject, model: ZooModel, inputs: Inputs, truth: Tensor, bound: float) -> list[str]:
    """Problems in half precision while every activation is cached; ``bound`` is upstream's own error."""
    logits, cache = model.run_with_cache(*inputs)
    error = typical(logits, truth)
    problems: list[str] = []
    if not error <= tolerances.SHOWN_ERROR_FACTOR * bound:
        errors = f"{logits.dtype} errs by {error:.1e} while everything is cached, upstream by {bound:.1e}"
        problems.append(f"{errors}: more than {tolerances.SHOWN_ERROR_FACTOR} times that")
    if subject.form == "canonical":  # inside upstream's own code a tensor has whatever dtype upstream gives it
        problems += [f"{name} is cached as {x.dtype}" for name, x in cache.items() if x.dtype != logits.dtype]
    return problems


@torch.no_grad()
def hooks(subject: Subject) -> Finding:
    """Compare each hook point that has a row with upstream's tensor at its place."""
    comparison = compare(subject)
    points = [name for name, point in subject.pair().model.hook_points().items() if not point.derived]
    problems = [f"{name}: {reason}" for name, reason in comparison.unread.items()]
    different = {name: error for name, error in comparison.errors.items() if not error <= tolerances.FLOAT64}
    problems += [f"{name} differs by {error:.1e}" for name, error in different.items()]
    # Points that upstream cannot show (a norm's scale inside its kernel) are proven by algebra from those it can.
    uncovered = [name for name in points if name not in comparison.errors]
    problems += [f"{name} is not in the hook map" for name in uncovered if _required(subject, name)]
    problems += _undefined(subject, [name for name in uncovered if name not in comparison.unread])
    detail = f"{len(comparison.errors)} of {len(points)} hook points compared"
    if uncovered:
        detail += f"; upstream shows no place for {', '.join(sorted({_family(name) for name in uncovered}))}"
    error = max(comparison.errors.values(), default=float("inf"))
    return Finding(error, tolerances.FLOAT64, tuple(problems), detail)


def _required(subject: Subject, name: str) -> bool:
    """Whether a canonical model's hook map must have a row for a hook point.

    Of a hooked upstream each has a row. What upstream does not show is inside fused kernels; ``maps.proven`` proves it.
    """
    canonical = ("hook_resid_pre", "hook_resid_post", "hook_logits")
    return subject.form == "canonical" and name.rsplit(".", 1)[-1] in canonical


def _undefined(subject: Subject, names: Sequence[str]) -> list[str]:
    """Problems of points inside a fused kernel of a hooked upstream: compared with nothing, and no equation's."""
    if subject.form != "mapped" or not names:
        return []
    equations = MapEquations(subject)
    ways = "name upstream's step-by-step place in reference_places(), or write its formula, such as '= q . k * 0.5'"
    return [f"{name} is compared with nothing: {ways}" for name in names if not equations.defines(name)]


def _family(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{l}.", name)


@dataclass
class Comparison:
    """Activations beside upstream's tensors.

    Attributes:
        errors: of each hook point that was compared, in firing order.
        unread: hook points whose place upstream never passed, with that reason.
    """

    errors: dict[str, float] = field(default_factory=dict[str, float])
    unread: dict[str, str] = field(default_factory=dict[str, str])


@torch.no_grad()
def compare(subject: Subject) -> Comparison:
    """Compare each mapped activation with upstream's tensor at its place."""
    upstream, model = subject.pair()
    passes = subject.passes()
    errors: dict[str, float] = {}
    unread: dict[str, str] = {}
    for rows, axes, scope in subject.references():
        sizes = {**axes, "batch": len(passes.inputs[0])}
        with scope, Recorder(upstream, [row.place for row in rows]) as tensors:
            output = subject.forward(upstream, *passes.inputs)
        if "hook_logits" in passes.acts:  # the main output, wherever a case reads it
            errors["hook_logits"] = max(worst(passes.acts["hook_logits"], output), errors.get("hook_logits", 0.0))
        for row in rows:
            if row.place not in tensors:
                unread[row.hook] = f"upstream never passed {row.place}"
            else:
                error = worst(passes.acts[row.hook], row.read(tensors[row.place], sizes))
                errors[row.hook] = max(error, errors.get(row.hook, 0.0))
    order = list(model.hook_points())
    return Comparison(
        {name: errors[name] for name in order if name in errors},
        {name: unread[name] for name in order if name in unread},
    )


def gradients(subject: Subject) -> Finding:
    """Compare gradients by the input and by every upstream weight, ours pulled back through the weight map."""
    upstream, model = subject.pair()
    inputs = subject.inputs(2)
    output = subject.forward(upstream, *(leaves := differentiable(inputs)))
    weights = torch.randn(output.shape, generator=subject.generator(2)).to(output)
    parameters = dict(upstream.named_parameters())
    theirs = _grads(output, weights, [*_floats(leaves), *parameters.values()])

    tensors = tensors_of(model)
    active = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    output = model(*(leaves := differentiable(inputs)))
    ours = _grads(output, weights, [*_floats(leaves), *active.values()])
    n = len(_floats(leaves))
    if any(grad is None for grad in (*ours[:n], *theirs[:n])):
        return Finding(problems=("no gradient reaches the input",))
    canonical: dict[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    canonical |= {name: grad for name, grad in zip(active, ours[n:], strict=True) if grad is not None}
    assert model.origin is not None
    pulled = pull_back(model.origin.map, tensors_of(upstream), canonical)

    errors: dict[str, float] = {}
    for our, their in zip(ours[:n], theirs[:n], strict=True):
        assert our is not None
        assert their is not None
        errors["the input"] = worst(our, their, float(their.abs().max()))
    twins: dict[int, list[str]] = {}  # one parameter may have several names
    for name, parameter in upstream.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    scale = max((float(grad.abs().max()) for grad in theirs[n:] if grad is not None and grad.numel()), default=1.0)
    for (name, parameter), grad in zip(parameters.items(), theirs[n:], strict=True):
        if not parameter.numel():
            continue  # a table of no tokens has no gradient
        their = torch.zeros_like(parameter) if grad is None else grad
        summands = [pulled[twin] for twin in twins[id(parameter)] if twin in pulled]
        our = torch.stack(summands).sum(0) if summands else torch.zeros_like(parameter)
        # A gradient that is zero in truth (the bias of keys) is only rounding: measure it by the others.
        errors[name] = worst(our, their, max(float(their.abs().max()), 1e-3 * scale))
    different = {name: error for name, error in errors.items() if not error <= tolerances.GRADIENT}
    problems = tuple(f"the gradient by {name} differs by {error:.1e}" for name, error in different.items())
    return Finding(max(errors.values()), tolerances.GRADIENT, problems, f"the input and {len(parameters)} weights")


def _floats(inputs: Inputs) -> list[Tensor]:
    return [x for x in inputs if x.is_floating_point()]


def _grads(output: Tensor, weights: Tensor, by: Sequence[Tensor]) -> Sequence[Tensor | None]:
    # torch's stubs leave out that what is not reached comes back as None.
    return torch.autograd.grad((output * weights).sum(), list(by), allow_unused=True)


__all__ = ["Comparison", "compare", "gradients", "hooks", "logits"]
