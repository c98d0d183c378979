"""Changes of canonical tensors that stand for changes of the rows that make them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations, permutations
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from prisma_conformance.doctor.change import Change
from prisma_conformance.doctor.completed import FACTOR
from prisma_conformance.doctor.families import families
from prisma_core import ZooModel, tensors_of
from prisma_core.plugin import AttentionSpec, TokenLayout

Part = Callable[[Tensor], Tensor]


def tensors(model: ZooModel) -> Iterator[Change]:
    """Yield rearrangements of tensors, and exchanges of tensors of one shape."""
    names = {name: list(members.values()) for name, members in families(tensors_of(model)).items()}
    yield from _layers(names)
    yield from _projections(model, names)
    yield from _exchanges(model, names)
    yield from _transposed(model, names)
    for tower, layout in _layouts(model):
        yield from _tokens(tower, layout, tensors_of(model))
    for name in names:
        if name.endswith("bias"):
            yield _each(f"no {name}: zeros in its row", names[name], torch.zeros_like)
        elif name.endswith(("gamma", "scale")):
            yield _each(f"no {name}: ones in its row", names[name], torch.ones_like)
        elif name.endswith("attn_bias"):
            yield _each(f"{name}: queries and keys exchanged", names[name], lambda x: x.transpose(-1, -2))
        elif name.endswith("rope_sin"):
            yield _each(f"{name} with its sign changed", names[name], torch.neg)
        if FACTOR.fullmatch(name):
            yield _each(f"{name}: 1 more than what its row makes", names[name], lambda x: 1 + x)


def _each(says: str, names: Iterable[str], change: Part) -> Change:
    """Change tensors one by one."""

    def edit(model: ZooModel) -> None:
        now = tensors_of(model)
        for name in names:
            now[name].copy_(change(now[name].detach().clone()))

    return Change(says, edit=edit)


# -------------------------------------------------------------------- layers


def _layers(names: Mapping[str, list[str]]) -> Iterator[Change]:
    """Blocks in another order: the last first, or each in the place of a neighbour."""
    stacks: dict[str, list[list[str]]] = {}
    for family, members in names.items():
        if "blocks.{l}." in family and len(members) > 1:
            stacks.setdefault(family.partition("{l}")[0], []).append(members)
    for stack, several in stacks.items():
        layers = range(max(map(len, several)))
        for order in dict.fromkeys(tuple(way) for way in (layers[::-1], [*layers[1:], 0], [layers[-1], *layers[:-1]])):
            says = f"{stack}{{l}}: rows that take upstream's layers in the order {list(order)}"
            yield _permuted(says, [(members, order) for members in several])


def _permuted(says: str, several: list[tuple[list[str], tuple[int, ...]]]) -> Change:
    def edit(model: ZooModel) -> None:
        now = tensors_of(model)
        for members, order in several:
            held = [now[members[layer]].detach().clone() for layer in order]
            for name, tensor in zip(members, held, strict=True):
                now[name].copy_(tensor)

    return Change(says, edit=edit)


# -------------------------------------------------------------------- projections of heads


def _projections(model: ZooModel, names: Mapping[str, list[str]]) -> Iterator[Change]:
    """Other orders of queries, keys and values, of heads, and of the channels of a head."""
    for family, members in names.items():
        match = re.fullmatch(r"(.*attn(?:\.\d+)?)\.(qkv|out)\.weight", family)
        spec: Any = model.get_submodule(members[0].rsplit(".", 2)[0]).spec if match else None
        if not match or not isinstance(spec, AttentionSpec) or spec.n_heads != spec.n_kv_heads:
            continue
        sizes = {"h": spec.n_heads, "d": spec.d_head}
        if match[2] == "out":
            for one, other in (("d h", "h d"), ("h d", "d h")):
                says = f"{family}: columns in the order ({one}), not ({other})"
                yield _each(says, members, _ordered(f"... ({one}) -> ... ({other})", sizes))
            continue
        part, bias = f"{match[1]}.qkv", names.get(f"{match[1]}.qkv.bias", [])
        yield from _orders(part, [*members, *bias], sizes)
        if bias:
            for alone in ("bias", "weight"):
                yield from _orders(f"{part}.{alone}", names[f"{part}.{alone}"], sizes)


def _orders(part: str, tensors: list[str], sizes: Mapping[str, int]) -> Iterator[Change]:
    """The rows of fused queries, keys and values in other orders."""
    for order in list(permutations(range(3)))[1:]:
        said = ", ".join(("queries", "keys", "values")[index] for index in order)
        moved = [("queries", "keys", "values")[i] for i, index in enumerate(order) if i != index]
        what = f"{moved[0]} and {moved[1]} exchanged" if len(moved) == 2 else f"{said} in this order"
        yield _each(f"{part}: {what}", tensors, _chunks(order))
    for order in ("h t d", "h d t", "t d h", "d t h", "d h t"):
        what = "q, k and v of each head side by side" if order == "h t d" else "another order of rows"
        for one, other in ((order, "t h d"), ("t h d", order)):  # a row may turn what it should leave
            says = f"{part}: {what if other == 't h d' else 'another order of rows'}, "
            says += f"({one.replace('t', 'three')}), not ({other.replace('t', 'three')})"
            yield _each(says, tensors, _ordered(f"({one}) ... -> ({other}) ...", {**sizes, "t": 3}))


def _ordered(pattern: str, sizes: Mapping[str, int]) -> Part:
    return lambda x: rearrange(x, pattern, **sizes)


def _chunks(order: tuple[int, ...]) -> Part:
    return lambda x: torch.cat([x.chunk(3)[index] for index in order])


# -------------------------------------------------------------------- exchanges


def _exchanges(model: ZooModel, names: Mapping[str, list[str]]) -> Iterator[Change]:
    """Exchange two tensors of one shape, or two modules whose tensors have the same shapes."""
    now = tensors_of(model)
    modules: dict[str, dict[str, list[str]]] = {}
    for name, members in names.items():
        part, _, last = name.rpartition(".")
        modules.setdefault(part, {})[last] = members
    shapes = {part: {last: now[m[0]].shape for last, m in each.items()} for part, each in modules.items()}
    for one, other in combinations(modules, 2):
        alike = shapes[one] == shapes[other] and _count(modules[one]) == _count(modules[other])
        if alike and ("{l}" in one) == ("{l}" in other):
            pairs = [*zip(*(_flat(modules[part]) for part in (one, other)), strict=True)]
            yield _swapped(f"the tensors of {one} and {other} exchanged", pairs)
            for last in modules[one] if len(modules[one]) > 1 else ():
                pairs = [*zip(modules[one][last], modules[other][last], strict=True)]
                yield _swapped(f"{one}.{last} and {other}.{last} exchanged", pairs)


def _flat(module: Mapping[str, list[str]]) -> list[str]:
    return [name for last in sorted(module) for name in module[last]]


def _count(module: Mapping[str, list[str]]) -> int:
    return len(_flat(module))


def _swapped(says: str, pairs: list[tuple[str, str]]) -> Change:
    def edit(model: ZooModel) -> None:
        now = tensors_of(model)
        for one, other in pairs:
            held = now[one].detach().clone()
            now[one].copy_(now[other])
            now[other].copy_(held)

    return Change(says, edit=edit)


def _transposed(model: ZooModel, names: Mapping[str, list[str]]) -> Iterator[Change]:
    now = tensors_of(model)
    for name, members in names.items():
        shape = now[members[0]].shape
        if name.endswith("weight") and len(shape) == 2 and shape[0] == shape[1]:
            yield _each(f"{name} transposed: its row needs ': a b -> b a'", members, lambda x: x.T)
        elif len(shape) > 3 and shape[-1] == shape[-2]:
            yield _each(f"{name}: patch kernels transposed", members, lambda x: x.transpose(-1, -2))
        if len(shape) > 3:
            yield _each(f"{name}: channels in the other order (bgr)", members, lambda x: x.flip(1))
            yield from _pixels(name, members, tuple(shape[1:]))


def _pixels(name: str, members: list[str], shape: tuple[int, ...]) -> Iterator[Change]:
    """Kernels ``[d c p q]``, or of videos ``[d c t p q]``, whose pixels were read in another order."""
    axes = ("c", *"tpq"[3 - len(shape[1:]) :])
    sizes = dict(zip(axes, shape, strict=True))
    now = " ".join(axes)
    for order in list(permutations(axes))[1:]:
        pattern = f"d ({' '.join(order)}) -> d {now}"
        says = f"{name}: pixels of a patch in the order ({' '.join(order)}), not ({now})"
        yield _each(says, members, lambda x, pattern=pattern: rearrange(x.flatten(1), pattern, **sizes))


def feeding(model: ZooModel) -> Iterator[tuple[list[str], Change]]:
    """Yield the tensors of each family with a change that whatever they make shows."""
    for members in families(tensors_of(model)).values():
        names = list(members.values())
        yield names, _each("", names, lambda x: x * 1.5 + 0.25 if x.is_floating_point() else x)


# -------------------------------------------------------------------- tokens


def _layouts(model: ZooModel) -> Iterator[tuple[str, TokenLayout]]:
    for prefix, tower in model.towers().items():
        if isinstance(layout := getattr(tower.spec, "layout", None), TokenLayout):
            yield prefix, layout


def _tokens(tower: str, layout: TokenLayout, now: Mapping[str, Tensor]) -> Iterator[Change]:
    n, grid = layout.n_prefix, {"r": layout.rows, "c": layout.columns}
    prefix, positions = f"{tower}embed.prefix", f"{tower}embed.pos_embed"
    if prefix in now:
        for order in list(permutations(range(n)))[1:] if n < 5 else [(*range(s, n), *range(s)) for s in range(1, n)]:
            yield _each(f"{prefix}: tokens in the order {list(order)}", [prefix], lambda x, o=order: x[list(o)])
    if positions not in now or now[positions].ndim != 2 or len(now[positions]) != layout.n_tokens:
        return
    changes: dict[str, Part] = {
        "column by column": lambda x: _head(x, n, rearrange(x[n:], "(f c r) d -> (f r c) d", **grid)),
        "none on prefix tokens": lambda x: torch.cat([torch.zeros_like(x[:n]), x[n:]]),
        "those of the prefix behind those of the patches": lambda x: x.roll(n, 0),
        "those of the patches before those of the prefix": lambda x: x.roll(-n, 0),
        "in the opposite order": lambda x: _head(x, n, x[n:].flip(0)),
        "one place on": lambda x: _rolled(x, 1),
        "one place back": lambda x: _rolled(x, -1),
        "those of the patches one place on": lambda x: _head(x, n, x[n:].roll(1, 0)),
        "those of the patches one place back": lambda x: _head(x, n, x[n:].roll(-1, 0)),
    }
    for says, change in changes.items():
        yield _each(f"{positions}: {says}", [positions], change)
    for shift in range(1, n):
        yield _each(
            f"{positions}: those of prefix tokens rotated by {shift}",
            [positions],
            lambda x, s=shift: torch.cat([x[:n].roll(s, 0), x[n:]]),
        )


def _head(x: Tensor, n: int, rest: Tensor) -> Tensor:
    return torch.cat([x[:n], rest])


def _rolled(x: Tensor, shift: int) -> Tensor:
    """The rows of tokens that have a position, turned among themselves."""
    have = x.any(1)
    return x.masked_scatter(have[:, None], x[have].roll(shift, 0))


__all__ = ["feeding", "tensors"]
