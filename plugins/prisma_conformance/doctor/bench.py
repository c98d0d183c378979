"""Upstream's numbers, recorded once, and those of changed adapters beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from prisma_conformance import tolerances
from prisma_conformance.doctor.change import Altered, Change
from prisma_conformance.doctor.numbers import Number, numbers
from prisma_conformance.doctor.places import all_places
from prisma_conformance.measure import worst
from prisma_conformance.recording import Recorder
from prisma_conformance.subject import Inputs, Subject, unfused
from prisma_core import Size, ZooModel, tensors_of
from prisma_core.plugin import AnySpec, HookMap, Place, PrismaError, Reader, Row, WeightMap
from prisma_core.zoo import read_adapter

OUTPUT = "hook_logits"


class Trial(NamedTuple):
    """A changed adapter beside upstream.

    Attributes:
        errors: of each hook point that was compared, in firing order.
        logits: the error of the main output.
        unread: hook points whose place upstream never passed, with that reason.
        ours, theirs: the activations, and upstream's tensors as their rows read them.
        gaps: canonical tensors that no rule makes, with the reasons.
        spare: upstream's tensors that no rule takes.
        spec, table, hooks: what the adapter says, with the change.
        shapes: of the canonical tensors.
    """

    errors: dict[str, float]
    logits: float
    unread: dict[str, str]
    ours: Mapping[str, Tensor]
    theirs: Mapping[str, Tensor]
    gaps: Mapping[str, str]
    spare: tuple[str, ...]
    spec: AnySpec
    table: WeightMap
    hooks: HookMap
    shapes: Mapping[str, torch.Size]

    @property
    def first(self) -> str | None:
        """The first hook point that differs."""
        return next((name for name, error in self.errors.items() if not error <= tolerances.FLOAT64), None)

    @property
    def before(self) -> str | None:
        """The hook point before that one."""
        names = list(self.errors)
        index = names.index(self.first) if self.first is not None else 0
        return names[index - 1] if index else None

    @property
    def tokens(self) -> tuple[int, int] | None:
        """The number of our tokens in the stream, and of upstream's; None where upstream does not show it."""
        streams = (name for name in self.theirs if name.endswith("blocks.0.hook_resid_pre") and "text." not in name)
        shapes = ((self.ours[name].shape, self.theirs[name].shape) for name in streams)
        return next(((ours[1], theirs[1]) for ours, theirs in shapes if len(ours) == len(theirs) == 3), None)

    @property
    def agrees(self) -> bool:
        """Whether the logits do."""
        return self.logits <= tolerances.FLOAT64


class Bench:
    """An upstream model, to put an adapter with changes beside.

    Args:
        subject: the adapter and its upstream. Its own hooked model is not made: it may be impossible to make.
    """

    def __init__(self, subject: Subject):
        self.subject = subject
        self.base = Change()
        self.upstream = subject.upstream()
        self.shapes = {name: tensor.shape for name, tensor in tensors_of(self.upstream).items()}
        self._outputs: dict[Size | None, tuple[Inputs, Tensor]] = {}
        self._tensors: dict[Place, Tensor | None] = {}

    def on(self, change: Change) -> Bench:
        """The bench on which every adapter has this change too."""
        other = Bench(self.subject)
        other.base = self.base.then(change)
        other.upstream, other._outputs, other._tensors = self.upstream, self._outputs, self._tensors
        return other

    @cached_property
    def numbers(self) -> list[Number]:
        """The numbers that upstream holds."""
        reader = Reader(self.upstream)
        with suppress(PrismaError):  # what it read until then counts
            read_adapter(self.subject.adapter, reader)
        return numbers(self.upstream, reader.record)

    def model(self, change: Change | None = None) -> tuple[ZooModel, Altered]:
        """Adapt upstream with a change.

        Raises:
            Exception: whatever the adapter raises.
        """
        full = self.base if change is None else self.base.then(change)
        adapter = Altered(self.subject.adapter, full)
        model = self.subject.make(adapter, self.upstream)
        full.edit(model)
        return model, adapter

    def logits(self, model: ZooModel, size: Size) -> float:
        """The error of the main output for inputs of a size."""
        inputs, theirs = self._output(model, size)
        return worst(model(*inputs), theirs)

    def run(self, change: Change | None = None) -> Trial:
        """Compare a changed adapter with upstream.

        Raises:
            Exception: whatever the adapter raises, or a model that it makes.
        """
        model, adapter = self.model(change)
        inputs, theirs = self._output(model, None)
        logits, cache = model.run_with_cache(*inputs)
        hooks = adapter.hooks(Reader(self.upstream), model.spec)
        points = [name for name, point in model.hook_points().items() if not point.derived]
        rows = hooks.bound(points)
        places = self._read(inputs, rows)
        sizes = {**hooks.sizes, "batch": len(inputs[0])}
        tensors = {row.hook: row.read(places[row.place], sizes) for row in rows if row.place in places}
        error = worst(logits, theirs)
        if OUTPUT in points:  # with a row or without
            tensors.setdefault(OUTPUT, theirs)
        errors = {name: worst(cache.store[name], tensor) for name, tensor in tensors.items()}
        if OUTPUT in points:
            errors[OUTPUT] = max(error, errors[OUTPUT])
        return Trial(
            {name: errors[name] for name in points if name in errors},
            error,
            {row.hook: f"upstream never passed {row.place}" for row in rows if row.place not in places},
            cache.store,
            tensors,
            adapter.table.gaps,
            tuple(name for name, shape in self.shapes.items() if name not in adapter.table.used and shape),
            model.spec,
            adapter.table,
            hooks,
            {name: tensor.shape for name, tensor in tensors_of(model).items()},
        )

    def places(self) -> dict[Place, Tensor]:
        """Upstream's tensors at all of its places, in the pass that is compared."""
        inputs, _ = self._outputs[None]
        with unfused(self.subject.adapter, self.upstream):
            return all_places(self.upstream, lambda: self.subject.forward(self.upstream, *inputs))

    def _output(self, model: ZooModel, size: Size | None) -> tuple[Inputs, Tensor]:
        if size not in self._outputs:
            drawn = model.sample_inputs(2, size=size, generator=self.subject.generator(1))
            device = self.subject.device
            inputs = tuple(x.to(device, torch.float64 if x.is_floating_point() else None) for x in drawn)
            self._outputs[size] = inputs, self.subject.forward(self.upstream, *inputs)
        return self._outputs[size]

    def _read(self, inputs: Inputs, rows: Iterable[Row]) -> dict[Place, Tensor]:
        """Upstream's tensors at the places of rows, each recorded once."""
        if unknown := [row.place for row in rows if row.place not in self._tensors]:
            with unfused(self.subject.adapter, self.upstream), Recorder(self.upstream, unknown) as tensors:
                self.subject.forward(self.upstream, *inputs)
            self._tensors |= {place: tensors.get(place) for place in unknown}
        return {place: tensor for place, tensor in self._tensors.items() if tensor is not None}


def attempt(bench: Bench, change: Change) -> Trial | None:
    """Try a change; None if it does not fit this model."""
    try:
        return bench.run(change)
    except Exception:  # noqa: BLE001  # an adapter may raise anything where its facts are not what it expects
        return None


__all__ = ["Bench", "Trial", "attempt"]
