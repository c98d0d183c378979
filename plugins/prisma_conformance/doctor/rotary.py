"""Angles by which upstream turns queries or keys, from both sides of its rotation, for rotary tables that are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from prisma_conformance import tolerances
from prisma_conformance.doctor.change import Change
from prisma_conformance.doctor.evidence import order_of
from prisma_core import tensors_of
from prisma_core.plugin import RopeSpec, TokenLayout


def rotary(spec: Any, first: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[Change]:
    """Yield rotary tables of the angles that upstream turns by, for each way in which channels may turn in pairs.

    Args:
        spec: of the tower.
        first: the hook point that differs.
        ours, theirs: activations, and upstream's.
    """
    part, _, name = first.rpartition(".")
    rope, layout = getattr(spec, "rope", None), getattr(spec, "layout", None)
    if not isinstance(rope, RopeSpec) or not isinstance(layout, TokenLayout) or not name.startswith("hook_rot_"):
        return
    if rope.per_head or rope.per_layer or theirs[first].shape != ours[first].shape:
        return
    before, after = ours[f"{part}.hook_{name[-1]}"], theirs[first]
    angle = _angles(_pairs(before, rope.layout), _pairs(after, rope.layout))
    turned = _turned(_pairs(before, rope.layout), angle)
    if (turned - _pairs(after, rope.layout)).abs().max() <= 1e3 * tolerances.FLOAT64 * after.abs().max():
        yield Change(
            f"other angles in rope_cos and rope_sin: {_said(angle, _angles_of(first, part, ours, rope), layout)}",
            edit=_tables(angle, rope),
        )


def _pairs(x: Tensor, layout: str) -> Tensor:
    """Channels that turn together ``[batch pos head pair 2]``."""
    pattern = "... (pair two) -> ... pair two" if layout == "interleaved" else "... (two pair) -> ... pair two"
    return rearrange(x, pattern, two=2)


def _angles(before: Tensor, after: Tensor) -> Tensor:
    """Angle of each position and pair ``[pos pair]``."""
    (a, b), (c, d) = before.unbind(-1), after.unbind(-1)
    return torch.atan2((a * d - b * c).sum((0, 2)), (a * c + b * d).sum((0, 2)))


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.unbind(-1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1)


def _angles_of(first: str, part: str, ours: Mapping[str, Tensor], rope: RopeSpec) -> Tensor:
    return _angles(_pairs(ours[f"{part}.hook_{first[-1]}"], rope.layout), _pairs(ours[first], rope.layout))


def _tables(angle: Tensor, rope: RopeSpec) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        now = tensors_of(model)
        for name, turn in (("rope_cos", torch.cos), ("rope_sin", torch.sin)):
            table = turn(angle)
            wide = table.repeat_interleave(2, -1) if rope.layout == "interleaved" else torch.cat([table, table], -1)
            now[name].copy_(wide.view(now[name].shape))

    return edit


def _said(angle: Tensor, ours: Tensor, layout: TokenLayout) -> str:
    """Where the angles differ: in the order of pairs or of patches, in the prefix, or in how fast they grow."""
    n = layout.n_prefix
    if not _close(angle[:n], ours[:n]):
        return "upstream turns tokens of the prefix too" if _close(ours[:n], 0 * ours[:n]) else "prefix tokens"
    if order := order_of(ours.T, angle.T):
        return f"pairs of channels in the order {order}"
    if order := order_of(ours[n:], angle[n:]):
        return f"patches in the order {order}"
    ratio = (angle[n:] / ours[n:]).nan_to_num(1.0, 1.0, 1.0).median(0).values
    if _close((ours * ratio).cos(), angle.cos()) and _close((ours * ratio).sin(), angle.sin()):
        if _close(ratio, -torch.ones_like(ratio)):
            return "the opposite ones, which is rope_sin with its sign changed"
        return f"angles of each pair times {_short(ratio)}: another base or unit of positions"
    steps = {"row": layout.columns if layout.rows > 1 else 0, "column": 1 if layout.columns > 1 else 0}
    said: list[str] = []
    for axis, step in steps.items():
        new, old = (x[n + step] - x[n] for x in (angle, ours)) if step else (ours[0] * 0, ours[0] * 0)
        if not _close(new, old):
            said.append(f"each {axis} turns pairs by {_short(new)} (it is {_short(old)})")
    return f"{'; '.join(said) or 'another origin'}: another base or unit of positions"


def _close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().amax()) <= 1e-9 if one.numel() else True


def _short(values: Tensor) -> str:
    return f"[{', '.join(f'{float(value):.4g}' for value in values)}]"


__all__ = ["rotary"]
