"""Tensors: each is accounted for, and export returns it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from prisma_conformance import tolerances
from prisma_conformance.finding import Finding
from prisma_conformance.measure import worst
from prisma_conformance.randomise import randomise
from prisma_conformance.subject import Subject
from prisma_core import export, tensors_of


@torch.no_grad()
def accounted(subject: Subject) -> Finding:
    """Account for every tensor on both sides, and test the reasons for which some are ignored."""
    upstream = subject.upstream()
    before, state = fingerprint(upstream), {name: tensor.clone() for name, tensor in tensors_of(upstream).items()}
    model = subject.make(subject.adapter, upstream)
    problems = [f"adapting changed {what}" for what in changes(upstream, before, state)]
    for name, tensor in tensors_of(model).items():
        if not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} holds values that are NaN or infinite")
    assert model.origin is not None
    ignored = [name for name in state if model.origin.map.reason_to_ignore(name) is not None]
    mapped = len(state) - len(ignored)
    # A tensor that upstream does not save is a constant that no checkpoint can change: adapters read its values.
    saved = [name for name in upstream.state_dict() if name in set(ignored) and state[name].is_floating_point()]
    error = _ignored_matter(subject, upstream, saved)
    if not error <= tolerances.FLOAT64:
        names = ", ".join(ignored[:6])
        problems.append(f"the map ignores tensors that matter, among {names}: logits move by {error:.1e}")
    problems += _filled_at_random(subject)
    detail = f"{mapped} tensors mapped, {len(ignored)} ignored with a reason"
    return Finding(error, tolerances.FLOAT64, tuple(problems), detail)


def _ignored_matter(subject: Subject, upstream: nn.Module, names: list[str]) -> float:
    """Change the tensors that the map ignores, and adapt again; return how far the logits then depart from upstream's.

    Where an adapter reads such a tensor in another way, the new hooked model follows.
    """
    if not names:
        return 0.0
    tensors = tensors_of(upstream)
    for name in names:
        noise = torch.rand(tensors[name].shape, generator=subject.generator(3)).to(tensors[name])
        tensors[name].add_(noise)
    inputs = subject.inputs(2)
    theirs = subject.forward(upstream, *inputs)
    return worst(subject.make(subject.adapter, upstream)(*inputs), theirs)


def _filled_at_random(subject: Subject) -> list[str]:
    """Map twice with other seeds: a tensor that mapping draws differs."""
    models: list[dict[str, Tensor]] = []
    for seed in (1, 2):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            models.append(tensors_of(subject.make(subject.adapter, subject.upstream())))
    first, second = models
    return [f"{name} is filled at random" for name, tensor in first.items() if not torch.equal(tensor, second[name])]


def fingerprint(upstream: nn.Module) -> dict[str, object]:
    """Everything simple about every module, by its path: flags, sizes, hooks, patched forwards."""
    plain = (bool, int, float, str, tuple, type(None))
    state: dict[str, object] = {}
    for path, module in cast("Iterator[tuple[str, nn.Module]]", upstream.named_modules()):
        state |= {f"{path}.{key}": value for key, value in vars(module).items() if isinstance(value, plain)}
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        state |= {f"{path}.{name}": len(getattr(module, name)) for name in hooks}
        state[f"{path}.forward"] = vars(module).get("forward")
    state |= {f"{name}.requires_grad": tensor.requires_grad for name, tensor in upstream.named_parameters()}
    return state


def changes(upstream: nn.Module, before: dict[str, object], state: dict[str, Tensor]) -> list[str]:
    """List what has changed of upstream since its fingerprint and its tensors were taken."""
    after = fingerprint(upstream)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    now = tensors_of(upstream)
    changed += [name for name, tensor in state.items() if name not in now or not torch.equal(tensor, now[name])]
    return [f"upstream's {name}" for name in changed]


@torch.no_grad()
def roundtrip(subject: Subject) -> Finding:
    """Export the hooked model's weights into a fresh upstream, and compare."""
    upstream, model = subject.pair()
    state = export(model)
    theirs = upstream.state_dict()
    if lacking := [f"export lacks {name}" for name in theirs if name not in state]:
        return Finding(problems=tuple(lacking))
    problems = [f"{name} comes back changed" for name in theirs if not _same(state[name], theirs[name])]
    fresh = randomise(subject.upstream(), subject.generator(5))
    # An eps is drawn and not saved: take it from the model the state belongs to.
    for ours, other in zip(fresh.modules(), upstream.modules(), strict=True):
        if isinstance(vars(other).get("eps"), float):
            ours.eps = other.eps
    fresh.load_state_dict(state, strict=True)
    inputs = subject.inputs()
    if not torch.equal(subject.forward(fresh, *inputs), subject.forward(upstream, *inputs)):
        problems.append("the reloaded upstream gives other logits")
    return Finding(problems=tuple(problems), detail=f"{len(theirs)} tensors")


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


__all__ = ["accounted", "changes", "fingerprint", "roundtrip"]
