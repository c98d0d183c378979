"""Path patching: the effect of one part of a model on another, along the paths between them that are not frozen.

Equation:
    1. Run clean with the sender's activation of the other run, everything between that is frozen at its clean value,
       and keep what the receivers get. 2. Run clean with the receivers' activations replaced by what they got.
Cost:
    Four passes for one sender: clean, other, and the two steps.
Misleads:
    With MLPs frozen too only direct paths count. The sum over paths is no sum of effects: the model is not linear.
Source:
    Wang et al. 2023, "Interpretability in the Wild", section 3.1; Goldowsky-Dill et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from prisma_lens.inputs import as_inputs, points_of
from prisma_lens.metrics import MetricLike, as_metric
from torch import Tensor

from prisma_core import HookContext, HookedModel, InputError, NotApplicable, Result
from prisma_core.plugin import Indices, Query, checked, layer_of, positions_of
from prisma_patch.passes import Inputs
from prisma_patch.places import Positions, layout_at, token_positions

FROZEN = ("hook_z", "hook_mlp_out")


@checked
def path_patch(
    model: HookedModel,
    clean: Tensor | Inputs,
    other: Tensor | Inputs,
    metric: MetricLike,
    sender: Query,
    receivers: Query = "hook_logits",
    *,
    heads: int | Indices | None = None,
    receiver_heads: int | Indices | None = None,
    pos: Positions = None,
    through: Query | None = None,
) -> Result:
    """Return how far the metric moves along the paths from a sender to receivers: ``[batch]``.

    Every attention output and MLP is frozen at its clean value, except what ``through`` names: ``facts["frozen"]``
    lists them, for a hooked upstream may lack hook points. With nothing frozen (``through`` all of them) and the
    output as receiver it is activation patching.

    >>> import prisma_core as prisma, torch
    >>> model = prisma.load("toy:scenes-3l")
    >>> clean, other = torch.rand(2, 1, 3, 96, 96)
    >>> path_patch(model, clean, other, "ladybird", ("z", 0), heads=1).shape
    {'batch': 1}

    Args:
        model: the model to run.
        clean: the inputs whose run is edited.
        other: inputs whose activation the sender takes, as many as ``clean`` or one for all.
        metric: as in ``activation_patch``.
        sender: hook points whose activation is replaced, such as ``("z", 0)``.
        receivers: hook points that get the change, such as ``("q_input", 2)`` or ``("resid_post", 5)``; by default the
            output, for direct effects on the logits.
        heads: of the sender, to replace; None for all.
        receiver_heads: of the receivers, to pass the change on to; None for all.
        pos: tokens of the sender to replace, as positions or a subset of the layout; None for all.
        through: hook points that are not frozen, such as ``"mlp_out"`` for paths through MLPs.

    Raises:
        UnknownName: a hook point, class or subset that does not exist.
        InputError: the runs do not fit together, or an activation has no heads.
        NotApplicable: all receivers are computed before the senders.
    """
    measure, ours, theirs = as_metric(model, metric), as_inputs(model, clean), as_inputs(model, other)
    senders, targets = points_of(model, sender), points_of(model, receivers)
    open_names = set() if through is None else set(points_of(model, through))
    frozen = [name for name in model.hook_points() if name.endswith(FROZEN) and layer_of(name) is not None]
    frozen = [name for name in frozen if name not in (*senders, *open_names, *targets)]
    order = list[str]()

    def note(x: Tensor, at: HookContext) -> None:
        order.append(at.name)

    with torch.no_grad():
        noted = dict.fromkeys([*senders, *targets], note)
        output, held = model.run_with_cache(*ours, names=[*frozen, *senders, *targets], hooks=noted)
        _, cache = model.run_with_cache(*theirs, names=senders, output=False)
    if max(map(order.index, targets)) < min(map(order.index, senders)):
        raise NotApplicable(
            f"No path leads from {senders[0]} to {targets[0]}, which is computed before it: give receivers behind the "
            "sender."
        )
    base = measure(output)
    tokens = token_positions(layout_at(model, senders, *ours), pos)

    def send(x: Tensor, at: HookContext) -> Tensor:
        return _mixed(model, at.name, x, cache[at.name].to(x), heads, tokens)

    def hold(x: Tensor, at: HookContext) -> Tensor:
        return held[at.name].to(x)

    hooks: dict[str, Callable[[Tensor, HookContext], Tensor]] = {**dict.fromkeys(frozen, hold)}
    hooks |= dict.fromkeys(senders, send)
    with torch.no_grad():
        _, got = model.run_with_cache(*ours, names=targets, hooks=hooks)

    def receive(x: Tensor, at: HookContext) -> Tensor:
        return _mixed(model, at.name, x, got[at.name].to(x), receiver_heads, None)

    with torch.no_grad():
        effect = measure(model.run_with_hooks(*ours, hooks=dict.fromkeys(targets, receive))) - base
    return Result(
        effect,
        ("batch", *(f"metric{at}" for at in range(effect.ndim - 1))),
        technique="path_patch",
        unit="change of the metric",
        baseline="the clean run",
        tensors={"clean": base},
        facts={"sender": senders, "receivers": targets, "through": sorted(open_names), "frozen": frozen},
    )


def _mixed(
    model: HookedModel,
    name: str,
    x: Tensor,
    new: Tensor,
    heads: int | Sequence[int] | None,
    tokens: Sequence[int] | None,
) -> Tensor:
    axes = model.hook_points()[name].axes.split()
    if new.shape[1:] != x.shape[1:] or new.shape[0] not in (1, x.shape[0]):
        raise InputError(f"{name} is {list(x.shape)} in the clean run and {list(new.shape)} in the other.")
    on = torch.ones((), dtype=torch.bool, device=x.device)
    for chosen, kind in ((heads, "head"), (tokens, "pos")):
        if chosen is None:
            continue
        if kind not in axes:
            raise InputError(f"{name} ({' '.join(axes)}) has no axis {kind!r} to choose from.")
        axis = axes.index(kind)
        mask = torch.zeros(x.shape[axis], dtype=torch.bool, device=x.device)
        mask[positions_of(chosen, x.shape[axis])] = True
        on = on & mask.view([-1 if at == axis else 1 for at in range(x.ndim)])
    return torch.where(on, new.expand_as(x), x)
