"""The places of a sweep: which parts of which activations are replaced, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from prisma_core import HookedModel, InputError, NotApplicable, TokenLayout
from prisma_core.plugin import indices, layer_of, positions_of

Positions: TypeAlias = int | slice | Sequence[int] | str | None
Region: TypeAlias = tuple[int | slice, int | slice] | None


def layout_at(model: HookedModel, names: Sequence[str], *inputs: Any) -> TokenLayout | None:
    """Return which token is where at hook points: of a pair's text tower that is not known."""
    return None if any(name.startswith("text.") for name in names) else model.layout_for(*inputs)


def token_positions(layout: TokenLayout | None, pos: Positions) -> list[int] | None:
    """Return the token positions that are meant, or None for all.

    Raises:
        InputError: there are none, or a subset is named and the model has no token layout.
    """
    if pos is None:
        return None
    if isinstance(pos, str):
        if layout is None:
            raise InputError(f"There is no token layout here, so pos={pos!r} means nothing; give positions.")
        return layout.positions(pos)
    if isinstance(pos, slice):
        if layout is None:
            raise InputError("A slice of positions needs the number of tokens, which is not known here.")
        return layout.positions(pos)
    return indices(pos)


def tokens_among(layout: TokenLayout | None, pos: Positions, n: int) -> list[int]:
    """Return which of the ``n`` tokens of a pass are meant, whose images may be of another size than the model's own.

    Raises:
        InputError: there are none, a subset is named and the model has no token layout, or a frame is and its size is
            not known.
    """
    if not isinstance(pos, str):
        return positions_of(pos, n)
    if layout is not None and n != layout.n_tokens:
        if pos.startswith("frame "):
            raise InputError(f"This pass has {n} tokens, the model's own size {layout.n_tokens}: give positions.")
        layout = layout.model_copy(update={"frames": 1, "rows": 1, "columns": n - layout.n_prefix})
    return positions_of(token_positions(layout, pos), n)


def check_layers_swept(at: object, names: Sequence[str], axes: Sequence[str], over: object) -> None:
    """Refuse several hook points where layers are not swept.

    Raises:
        InputError: with ``at`` and ``over`` as the user gave them.
    """
    if "layer" not in axes and len(names) > 1:
        raise InputError(f"at={at!r} is {len(names)} hook points: put 'layer' into over={over!r}, or ask for one.")


def check_reach(model: HookedModel, names: Sequence[str], places: Places) -> None:
    """Refuse a patch that cannot move the output: behind the last attention, at tokens that nothing reads.

    Raises:
        NotApplicable: with what the model reads.
    """
    spec = getattr(model, "spec", None)
    pool = getattr(spec, "pool", None)
    if pool is None or getattr(spec, "layout", None) is None or getattr(pool, "kind", "") != "token":
        return
    if places.tokens is None or 0 in places.tokens:
        return
    last = len(spec.blocks) - 1
    late = ("hook_resid_post", "hook_resid_mid", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post")
    if all(layer_of(name) == last and name.endswith((*late, "mlp.hook_pre")) for name in names):
        raise NotApplicable(
            f"This model reads its class token alone, and {names[0]} at other tokens no longer reaches it: patch an "
            "earlier layer, or pos='cls'."
        )


class Places:
    """Parts of each activation that a sweep replaces."""

    def __init__(
        self,
        model: HookedModel,
        names: Sequence[str],
        axes: Sequence[str],
        layout: TokenLayout | None,
        pos: Positions,
        heads: int | Sequence[int] | None,
        region: Region,
    ):
        points = model.hook_points()
        self.axes = {name: points[name].axes.split() for name in names}
        self.swept = [axis for axis in axes if axis != "layer"]
        self.layout, self.region = layout, region
        self.tokens = token_positions(layout, pos)
        self.heads = None if heads is None else [heads] if isinstance(heads, int) else list(heads)
        for name in names:
            self._check(name, pos)

    def _check(self, name: str, pos: Positions) -> None:
        names, text = set(self.axes[name]), " ".join(self.axes[name])
        grid = {"row", "column"} <= names
        for axis in self.swept:
            if self.own(name, axis) is None:
                raise InputError(f"{name} ({text}) has no axis {axis!r} to sweep over.")
        if pos is not None and not {"pos", "query_pos"} & names:
            instead = "give region=(rows, columns) instead" if grid else "leave pos out"
            raise InputError(f"{name} ({text}) has no positions to choose from; {instead}.")
        if self.heads is not None and "head" not in names:
            raise InputError(f"{name} ({text}) has no axis 'head', so there are no heads to choose.")
        if self.region is None:
            return
        region: object = self.region
        if not (
            isinstance(region, tuple) and len(region) == 2 and all(isinstance(each, int | slice) for each in region)
        ):
            raise InputError(f"Expected region=(rows, columns), each a number or a slice, got {region!r}.")
        if not grid:
            instead = "give pos= instead" if {"pos", "query_pos"} & names else "leave region out"
            raise InputError(f"{name} ({text}) has no rows and columns to choose from; {instead}.")

    def own(self, name: str, axis: str) -> str | None:
        """The axis of an activation that is meant: the queries' where tokens have two."""
        names = self.axes[name]
        return axis if axis in names else "query_pos" if axis == "pos" and "query_pos" in names else None

    def _chosen(self, name: str, axis: str, size: int) -> list[int]:
        choice = self.tokens if axis in ("pos", "query_pos") else self.heads if axis == "head" else None
        return list(range(size)) if choice is None else positions_of(choice, size)

    def parts(self, name: str, shape: Sequence[int]) -> list[list[int]]:
        """Return the places along each swept axis of an activation."""
        sizes = dict(zip(self.axes[name], shape, strict=True))
        axes_swept = [str(self.own(name, axis)) for axis in self.swept]
        return [self._chosen(name, axis, sizes[axis]) for axis in axes_swept]

    def counts(self, names: Sequence[str], shapes: Mapping[str, torch.Tensor]) -> list[int]:
        """Return how many places there are along each swept axis, the same for all hook points.

        Raises:
            NotApplicable: they differ.
        """
        every = {name: [len(rows) for rows in self.parts(name, shapes[name].shape)] for name in names}
        if len({tuple(each) for each in every.values()}) != 1:
            each = ", ".join(f"{name} has {' x '.join(map(str, count))}" for name, count in every.items())
            raise NotApplicable(
                f"The places differ between hook points ({each}), so there is no one sweep over them: "
                f"give at= those that agree, such as at={names[0]!r}."
            )
        return every[names[0]]

    def index(self, name: str, chosen: Sequence[int]) -> tuple[Any, ...]:
        """Return the index into an activation of one variant."""
        fixed: dict[str, Any] = dict(zip((str(self.own(name, axis)) for axis in self.swept), chosen, strict=True))
        row, column = self.region or (None, None)
        whole = {"pos": self.tokens, "query_pos": self.tokens, "head": self.heads, "row": row, "column": column}
        index = [fixed.get(axis, whole.get(axis)) for axis in self.axes[name]]
        lists = [at for at, each in enumerate(index) if isinstance(each, list)]
        if len(lists) > 1:  # several lists choose a grid of places, not pairs
            grids = torch.meshgrid(*(torch.tensor(index[at]) for at in lists), indexing="ij")
            for at, grid in zip(lists, grids, strict=True):
                index[at] = grid
        return tuple(slice(None) if each is None else each for each in index)

    def labels(self, names: Sequence[str], shapes: Any, n_heads: int) -> dict[str, tuple[str, ...]]:
        """Return a label for each place of each swept axis."""
        first, blocks = names[0], list(dict.fromkeys(block_of(name) for name in names))
        plain = all(block.startswith("blocks.") for block in blocks)
        labels = {"layer": tuple(f"L{block.removeprefix('blocks.')}" if plain else block for block in blocks)}
        for axis, chosen in zip(self.swept, self.parts(first, shapes[first].shape), strict=True):
            tokens = self.layout.token_names() if self.layout is not None else []
            axis_name = self.own(first, axis)
            if (
                axis_name in ("pos", "query_pos", "key_pos")
                and len(tokens) == shapes[first].shape[self.axes[first].index(axis_name)]
            ):
                labels[axis] = tuple(tokens[each] for each in chosen)
            else:
                every = chosen if axis != "head" or len(chosen) == n_heads else range(n_heads)
                labels[axis] = tuple(f"H{each}" if axis == "head" else str(each) for each in every)
        return labels


def block_of(name: str) -> str:
    """Return the block of a hook point: ``stages.1.blocks.0.attn.hook_z`` is of ``stages.1.blocks.0``."""
    before, _, rest = f".{name}".rpartition(".blocks.")
    return f"{before}.blocks.{rest.partition('.')[0]}".removeprefix(".")
