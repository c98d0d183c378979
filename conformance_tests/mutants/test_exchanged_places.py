"""Rows of hook maps at each other's places, and at other places of upstream: equations fail for each of them.

A sample of them; with ``--hypothesis-profile long`` all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from prisma_conformance import CHECKS, Case, tolerances
from prisma_conformance.checks.equations import MapEquations
from prisma_conformance.checks.formulas import Acts
from prisma_conformance.doctor.maps import Moved
from prisma_conformance.doctor.places import all_places, readings
from prisma_conformance.measure import worst
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor

from conformance_tests.helpers.cascade import CASE as CASCADE
from conformance_tests.helpers.cascade import CascadeAdapter
from prisma_core.host import installed
from prisma_core.plugin import HookMap, Row

TIMM = (
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224",
    "hiera_tiny_224",
    "convnext_tiny",
    "convnextv2_tiny",
    "samvit_base_patch16",
)
VIDEO = ("TimesformerForVideoClassification", "VJEPA2ForVideoClassification", "VJEPA2Predictor")
EXCHANGES, MOVES = 60, 40  # of one map, and the whole check for one in twenty of them


def _timm(name: str) -> Case:
    pytest.importorskip("timm", reason="timm is not installed: pip install 'prisma-interp[timm]'")
    case = installed().source("timm").case(name)
    assert case is not None
    return case


def _video(name: str) -> Case:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'prisma-interp[hf]'")
    from prisma_vivit.cases import cases

    return next(case for case in cases() if case.name == name)


def _autoencoder(name: str) -> Case:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'prisma-interp[hf]'")
    from prisma_hf.cases import autoencoder

    return Case(name, autoencoder)


FAMILIES: dict[str, Callable[[str], Case]] = {
    **dict.fromkeys(TIMM, _timm),
    **dict.fromkeys(VIDEO, _video),
    "ViTMAEForPreTraining": _autoencoder,
    "cascade": lambda name: CASCADE,
}


class Places(NamedTuple):
    """A map, and what stands at upstream's places."""

    subject: Subject
    equations: MapEquations
    table: HookMap

    @property
    def acts(self) -> Acts:
        return self.equations.clean.after

    def exchanges(self) -> Iterator[dict[Row, Tensor]]:
        """Two rows at each other's places, as the hook map may read them, where these hold other tensors."""
        for one, other in combinations(self.table.rows, 2):
            x, y = self.acts[one.hook], self.acts[other.hook]
            if x.shape != y.shape or worst(x, y) > tolerances.FLOAT64:
                yield {_at(one, other): y, _at(other, one): x}

    def moves(self) -> Iterator[dict[Row, Tensor]]:
        """A row at each place of upstream's that holds another tensor of its shape."""
        upstream = self.subject.pair().upstream
        places = all_places(upstream, lambda: self.subject.forward(upstream, *self.equations.inputs))
        for row in self.table.rows:
            for other, tensor in readings(row, self.table, places, len(self.acts[row.hook])):
                right = self.acts[row.hook]
                if tensor.shape == right.shape and worst(tensor, right) > tolerances.FLOAT64:
                    yield {other: tensor}

    def fails(self, wrong: dict[Row, Tensor]) -> bool:
        """Whether an equation fails on the activations of a pass in which rows read other tensors."""
        acts = {**self.acts, **{row.hook: tensor for row, tensor in wrong.items()}}
        points = {row.hook for row in wrong}
        return self._formula_fails(points, acts) or self._own_fails(acts)

    def _formula_fails(self, points: Collection[str], acts: Acts) -> bool:
        for one in (*self.equations.everywhere, *self.equations.rows):
            if (one.point in points or one.reads & set(points)) and self.equations.reason(str(one)) is None:
                try:
                    if not one.error(acts, acts) <= tolerances.FLOAT64:
                        return True
                except Exception:  # noqa: BLE001  # upstream's modules refuse shapes in their own ways
                    return True
        return False

    def _own_fails(self, acts: Acts) -> bool:
        try:
            errors = self.equations.of_adapter(acts)
        except Exception:  # noqa: BLE001  # equations of adapters do not expect other shapes
            return True
        return any(not e <= tolerances.FLOAT64 for text, e in errors.items() if self.equations.reason(text) is None)

    def checked(self, wrong: dict[Row, Tensor]) -> bool:
        """Whether the checks of a map pass for the table with these rows."""
        by_hook = {row.hook: row for row in wrong}
        table = HookMap(tuple(by_hook.get(row.hook, row) for row in self.table.rows), self.table.sizes)
        subject = self.subject.variant(Moved(self.subject.adapter, table), self.subject.make)
        return all(run_check(CHECKS[name], subject).passed for name in ("algebra", "maps.proven"))


def _at(one: Row, other: Row) -> Row:
    return replace(one, place=other.place, how=other.how, call=other.call)


@pytest.fixture(params=FAMILIES)
def places(request: pytest.FixtureRequest) -> Places:
    case = FAMILIES[request.param](request.param)
    upstream = case.build()
    adapter = CascadeAdapter() if case is CASCADE else installed().adapter(upstream)
    subject = Subject(case, adapter, upstream, seed=1)
    equations = MapEquations(subject)
    return Places(subject, equations, HookMap(tuple(equations.scope.rows.values()), subject.table().sizes))


def _sample(every: Iterator[dict[Row, Tensor]], n: int) -> list[dict[Row, Tensor]]:
    several = list(every)
    whole = settings().max_examples >= 1000
    return several if whole else random.Random(0).sample(several, min(n, len(several)))


@torch.no_grad()
def test_rows_at_each_others_places_are_caught(places: Places) -> None:
    several = _sample(places.exchanges(), EXCHANGES)
    unseen = [" <-> ".join(row.hook for row in wrong) for wrong in several if not places.fails(wrong)]
    assert several
    assert not unseen
    for wrong in several[:: 20 * (len(several) // EXCHANGES or 1)]:
        assert not places.checked(wrong), wrong.keys()


@torch.no_grad()
def test_rows_at_other_places_are_caught(places: Places) -> None:
    several = _sample(places.moves(), MOVES)
    unseen = [str(row) for wrong in several if not places.fails(wrong) for row in wrong]
    assert several
    assert not unseen
    for wrong in several[:: 20 * (len(several) // MOVES or 1)]:
        assert not places.checked(wrong), wrong.keys()
