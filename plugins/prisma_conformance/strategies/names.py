"""Hook names, queries over them, and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from prisma_core import HookedModel
from prisma_core.plugin import Query, layer_of, short_name

Index = int | slice | list[int]


def hook_names(model: HookedModel, *, derived: bool = True, min_size: int = 1) -> st.SearchStrategy[list[str]]:
    """Lists of different hook names of a model, in any order.

    Args:
        model: any hooked model.
        derived: False leaves out the points that are computed only when they are asked for.
        min_size: the shortest list.
    """
    names = [name for name, point in model.hook_points().items() if derived or not point.derived]
    return st.lists(st.sampled_from(names), min_size=min_size, max_size=max(min_size, 6), unique=True)


@st.composite
def queries(draw: st.DrawFn, names: Sequence[str]) -> Query:
    """Queries over these hook names: full names, shorthands, layers, globs, predicates and collections of those."""
    name = draw(st.sampled_from(list(names)))
    layer = layer_of(name)
    forms: list[st.SearchStrategy[Any]] = [
        st.just(name),
        st.sampled_from(_shorthands(name)),
        st.just(f"*{name.rsplit('.', 1)[-1]}"),
        st.just(_glob(name)),
        st.just(_Predicate(short_name(name))),
        st.lists(st.sampled_from(list(names)), min_size=1, max_size=4),
    ]
    if layer is not None:
        depth = 1 + max(n for each in names if (n := layer_of(each)) is not None and _tower(each) == _tower(name))
        forms.append(st.sampled_from([(short_name(name), layer), (short_name(name), layer - depth)]))
    return draw(st.one_of(*forms))


class _Predicate:
    """A predicate over names that prints as what it asks."""

    def __init__(self, short: str):
        self.short = short

    def __call__(self, name: str) -> bool:
        return short_name(name) == self.short

    def __repr__(self) -> str:
        return f"<short name is {self.short}>"


def _tower(name: str) -> str:
    return name.partition("blocks.")[0] if "blocks." in name else ""


def _shorthands(name: str) -> list[str]:
    """Return the shorthands of a name: as much of its path as one likes, with and without ``hook_``."""
    *path, last = name.split(".")
    tails = [path[start:] for start in range(len(path) + 1)]
    return [".".join([*tail, end]) for tail in tails for end in (last, last.removeprefix("hook_"))]


def _glob(name: str) -> str:
    layer = layer_of(name)
    return name if layer is None else name.replace(f"blocks.{layer}.", "blocks.*.", 1)


def positions(n: int) -> st.SearchStrategy[Index]:
    """Choices of at least one of ``n`` places along an axis: a number, a slice, a list of numbers, from the end too."""
    place = st.integers(-n, n - 1)
    return st.one_of(
        place,
        st.lists(place, min_size=1, max_size=n),
        st.slices(n).filter(lambda cut: len(range(n)[cut]) > 0 and (cut.step or 1) > 0),
    )
