"""Passes of a sweep: several variants to a pass, from the last clean stream on, and only the tokens that still matter.

A variant of layer l starts at the clean stream before block l. Where it changes leading tokens alone (the class token)
behind the keys and values of block l, that block computes these tokens alone, and the others are the clean run's. The
last block computes the tokens that the output is made of. Of a dual encoder only the tower of the variant runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from prisma_core import HookContext, HookedDual, HookedModel, HookedViT, InputError
from prisma_core.plugin import BlockSpec, BriefRepr, behaviour_of, checked, layer_of, shown

Inputs: TypeAlias = tuple[Tensor, ...]
Part: TypeAlias = tuple[Any, ...]


@checked
@dataclass(frozen=True, repr=False)
class Variant(BriefRepr):
    """One replacement: at a hook point, a part of the activation by the same part of another.

    Attributes:
        name: the hook point's full name.
        part: an index for each axis.
        source: the activation to take the part from, ``[batch ...]`` or ``[1 ...]``; None puts in zeros.
    """

    name: str
    part: Part
    source: Tensor | None

    @checked
    def apply(self, rows: Tensor) -> None:
        """Edit one copy of the batch in place.

        Raises:
            InputError: the activation has no such part, or the other one has another shape.
        """
        try:
            rows[self.part]
        except (IndexError, TypeError, ValueError) as error:  # torch's ways to say it
            places = ", ".join(shown(each) for each in self.part if not isinstance(each, slice))
            raise InputError(
                f"{self.name} is {list(rows.shape)} and has no such places ({error}), for {places}: pos is a position, "
                "several, a slice or a subset of the layout such as 'cls'."
            ) from error
        if self.source is None:
            rows[self.part] = 0
            return
        if self.source.shape[1:] != rows.shape[1:] or self.source.shape[0] not in (1, rows.shape[0]):
            raise InputError(
                f"{self.name} is {list(rows.shape)} in the clean run and {list(self.source.shape)} in the other: "
                "give images of the same size, and as many of them or one."
            )
        rows[self.part] = self.source.to(rows).expand_as(rows)[self.part]


def passes_of(model: HookedModel, inputs: Inputs) -> Passes:
    """Return the passes that suit a model."""
    if isinstance(model, HookedDual) and len(inputs) == 2:
        return DualPasses(model, inputs)
    if not isinstance(model, HookedViT) or len(inputs) > 1:
        return Passes(model, inputs)
    # A pass that starts inside does not know the size of the image, which rotary positions depend on.
    native = tuple(inputs[0].shape[-2:]) == tuple(model.spec.image_size)
    return RestartedPasses(model, inputs) if native or model.spec.rope is None else Passes(model, inputs)


@dataclass
class Passes:
    """Count passes, each over several copies of the inputs.

    Attributes:
        inputs: the clean inputs.
    """

    model: HookedModel
    inputs: Inputs

    def clean(self) -> Tensor:
        """Return the output of the clean run."""
        return self.model(*self.inputs)

    def group(self, name: str) -> int:
        """Return a number that variants must share to run in one pass, the earliest first."""
        return 0

    def outputs(self, variants: Sequence[Variant]) -> list[Tensor]:
        """Return the output under each variant of one group."""
        return list(self.run(variants).split(len(self.inputs[0])))

    def run(self, variants: Sequence[Variant]) -> Tensor:
        """Return the outputs under the variants of one group, one copy of the batch after the other."""
        return self._pass(self.inputs, variants)

    def _pass(self, clean: Inputs, variants: Sequence[Variant], **limits: Any) -> Tensor:
        hooks = {name: _editor(variants, name, len(clean[0])) for name in {variant.name for variant in variants}}
        return self.model.run_with_hooks(*(copies(each, len(variants)) for each in clean), hooks=hooks, **limits)


@dataclass
class RestartedPasses(Passes):
    """Passes of a vision transformer that start at the clean stream before the patched layer.

    Attributes:
        output: of the clean run.
        streams: the clean stream before each block: ``[batch pos d_model]``.
        read: how many leading tokens the output is made of; None where it is all, or where other hooks run too.
        axes: the axis of the tokens, by hook point; None where it holds other tokens than those that are computed.
        cut: whether a hook point holds the computed tokens alone, by the block's spec and the name within the block.
    """

    model: HookedViT
    output: Tensor = field(init=False)
    streams: list[Tensor] = field(init=False)
    read: int | None = field(init=False)
    axes: dict[str, int | None] = field(default_factory=dict[str, "int | None"])
    cut: dict[tuple[BlockSpec, str], bool] = field(default_factory=dict[Any, bool])

    def __post_init__(self) -> None:
        whole = self.model.open_hooks() or behaviour_of(self.model)  # parts of other classes may mix tokens
        self.read = None if whole else self.model.leading_read
        self.output, cache = self.model.run_with_cache(*self.inputs, names="*.hook_resid_pre")
        self.streams = [cache["resid_pre", layer] for layer in range(self.model.spec.n_layers)]

    def clean(self) -> Tensor:
        return self.output

    def group(self, name: str) -> int:
        layer = layer_of(name)
        return -1 if layer is None else layer

    def run(self, variants: Sequence[Variant]) -> Tensor:
        layer, last = self.group(variants[0].name), len(self.streams) - 1
        if layer < 0:
            return self._pass(self.inputs, variants)
        stream, here = (self.streams[layer],), {"start_at_layer": layer}
        if self.read is None:
            return self._pass(stream, variants, **here)
        changed = max(self._changed(variant) for variant in variants)
        if layer == last:
            leading = self.read if all(map(self._is_read, variants)) else max(changed, self.read)
            return self._pass(stream, self._shortened(variants, leading), leading=leading, **here)
        if 2 * changed > stream[0].shape[1]:
            return self._pass(stream, variants, leading=self.read, **here)
        shortened = self._shortened(variants, changed)
        rows = self._pass(stream, shortened, leading=changed, stop_at_layer=layer + 1, **here)
        rest = copies(self.streams[layer + 1][:, changed:], len(variants))
        return self.model(torch.cat([rows, rest], 1), start_at_layer=layer + 1, leading=self.read)

    def _changed(self, variant: Variant) -> int:
        """Return how many leading tokens hold all that a variant changes in the stream behind its block."""
        axis, n = self._token_axis(variant), self.streams[0].shape[1]
        if axis is None or isinstance(variant.part[axis], slice):
            return n
        part = variant.part[axis]
        places = [part] if isinstance(part, int) else part.flatten().tolist() if isinstance(part, Tensor) else part
        return n if min(places) < 0 else min(n, max(places) + 1)

    def _is_read(self, variant: Variant) -> bool:
        """Return whether a variant fits a last block that computes no more tokens than are read."""
        axis = self._token_axis(variant)
        if axis is None:
            return self._axis_of(variant.name) is None
        return variant.part[axis] == slice(None) or self._changed(variant) <= (self.read or 0)

    def _shortened(self, variants: Sequence[Variant], leading: int) -> list[Variant]:
        """Return variants whose sources hold leading tokens alone, where their hook points do."""
        axes = [self._token_axis(each) for each in variants]
        return [
            each if axis is None or each.source is None else replace(each, source=each.source.narrow(axis, 0, leading))
            for each, axis in zip(variants, axes, strict=True)
        ]

    def _token_axis(self, variant: Variant) -> int | None:
        """Return the axis of the computed tokens, or None where all are held, or the source has another number."""
        axis = self._axis_of(variant.name)
        if axis is None or variant.source is None or variant.source.shape[axis] == self.streams[0].shape[1]:
            return axis
        return None  # Variant.apply says so

    def _axis_of(self, name: str) -> int | None:
        """Return the axis of the computed tokens, or None where a hook point holds all; looked up once."""
        if name not in self.axes:
            axes = self.model.hook_points()[name].axes.split()
            axis = next((axes.index(axis) for axis in ("pos", "query_pos") if axis in axes), None)
            self.axes[name] = axis if axis is not None and self._is_cut(name, axis) else None
        return self.axes[name]

    def _is_cut(self, name: str, axis: int) -> bool:
        layer = self.group(name)
        key = (self.model.spec.blocks[layer], name.partition(f".{layer}.")[2])
        if key not in self.cut:
            here = {"start_at_layer": layer, "stop_at_layer": layer + 1, "leading": 1}
            _, cache = self.model.run_with_cache(self.streams[layer][:1], names=[name], output=False, **here)
            self.cut[key] = cache[name].shape[axis] == 1
        return self.cut[key]


def copies(x: Tensor, n: int) -> Tensor:
    """Return a batch ``n`` times, one after the other."""
    return x.repeat(n, *[1] * (x.ndim - 1))


def _editor(variants: Sequence[Variant], name: str, n: int) -> Callable[[Tensor, HookContext], None]:
    mine = [(index, variant) for index, variant in enumerate(variants) if variant.name == name]

    def edit(x: Tensor, at: HookContext) -> None:
        for index, variant in mine:
            variant.apply(x[index * n : (index + 1) * n])

    return edit


@dataclass
class DualPasses(Passes):
    """Passes of a dual encoder: the tower of the variants runs, and the other is the clean run's.

    Attributes:
        embeds: what each tower makes of the clean inputs, images first.
        towers: the passes of each tower.
    """

    model: HookedDual
    embeds: Inputs = field(init=False)
    towers: dict[str, Passes] = field(init=False)

    def __post_init__(self) -> None:
        image, tokens = self.inputs
        seen, read = passes_of(self.model.vision, (image,)), passes_of(self.model.text, (tokens,))
        self.embeds, self.towers = (seen.clean(), read.clean()), {"vision.": seen, "text.": read}

    def clean(self) -> Tensor:
        return self.model.compare(*self.embeds)

    def group(self, name: str) -> int:
        prefix = _side(name)
        if prefix not in self.towers:
            return -2
        return (1000 if prefix == "text." else 0) + self.towers[prefix].group(name.removeprefix(prefix))

    def outputs(self, variants: Sequence[Variant]) -> list[Tensor]:
        n_images, n_texts = map(len, self.inputs)
        seen, read = self.embeds
        prefix = _side(variants[0].name)
        if prefix in self.towers:
            inner = [replace(each, name=each.name.removeprefix(prefix)) for each in variants]
            output = self.towers[prefix].run(inner)
            seen, read = (output, read) if prefix == "vision." else (seen, output)
            return list(self.model.compare(seen, read).split(*((n_images, 0) if prefix == "vision." else (n_texts, 1))))
        return [self._compared(variant) for variant in variants]

    def _compared(self, variant: Variant) -> Tensor:
        """Run what stands behind both towers, with one variant."""

        def edit(x: Tensor, at: HookContext) -> None:
            variant.apply(x)

        with self.model.hooks({variant.name: edit}):
            return self.model.compare(*self.embeds)


def _side(name: str) -> str:
    return f"{name.partition('.')[0]}."
