"""Hook maps that cannot be used, and broken ones, which the kit catches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prisma_conformance import check
from prisma_conformance.registry import select
from prisma_conformance.run import run_check
from prisma_conformance.subject import Subject
from torch import Tensor, nn
from windows import HEAD, SQUARE, Adapter, Upstream

from prisma_core import (
    PrismaError,
)
from prisma_core.contract.adapter import MapAdapter
from prisma_core.contract.case import Case
from prisma_core.errors import qualified_name
from prisma_core.maps.places import HookMap, Place
from prisma_core.maps.reader import Reader
from prisma_core.upstream import observer
from prisma_core.zoo import adapt_with

pytestmark = pytest.mark.usefixtures("in_float64")

# -------------------------------------------------------------------- tables that cannot be used


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("nothing -> hook_embed : batch pos d_model", "no module 'nothing'"),
        ("embed -> hook_embed", "must name its axes"),
        ("embed -> hook_embed : batch pos d -> batch (pos d)", "must name its axes"),
        ("embed -> hook_embed : a b c\nhead -> hook_embed : a b", "several rows for hook_embed"),
        ("layers.{l} -> blocks.{l}.hook_resid_post : batch pos d_model", "leaves numbers open"),
        ("embed -> blocks.{l}.hook_resid_post : batch pos d_model", "'embed -> .*' leaves numbers open"),
        ("embed : scores -> hook_embed : a b c", "is not a place"),
        ("embed -> upstream.hook_embed : a b c", "is the model's own"),
    ],
)
def test_tables_that_cannot_be_used(upstream, rows, words):
    with pytest.raises(PrismaError, match=words):
        adapt_with(with_rows(lambda _: rows), upstream)


def test_a_function_cannot_be_written_through(upstream):
    class Turned(Adapter):
        def hooks(self, upstream: Reader, spec: Any) -> HookMap:
            return HookMap.parse("embed -> hook_embed : {flipped}", {"flipped": lambda x: x.flip(1)})

    with pytest.raises(PrismaError, match=r"functions have no inverse to write by\. Got '\{flipped\}'"):
        adapt_with(Turned(), upstream)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("embed -> hook_embed : batch d_model", r"has the axes 'batch d_model'.*holds \[2, 6, 8\]"),
        ("blocks.0.attn : out2 -> hook_embed : batch pos d_model", "No tensor passes"),
    ],
)
def test_rows_that_do_not_fit_what_passes(upstream, x, rows, words):
    with pytest.raises(PrismaError, match=words):
        adapt_with(with_rows(lambda _: rows), upstream).run_with_cache(x)


@pytest.mark.parametrize(
    ("how", "shape"),
    [
        (HEAD, (4, 2, 3, 5)),
        (SQUARE, (4, 2, 3, 3)),
        ("batch d_model row column -> batch row column d_model", (2, 4, 3, 5)),
        ("batch d_model 1 1 -> batch d_model", (2, 7, 1, 1)),
        ("batch pos (head d_head) -> batch pos head d_head", (2, 5, 6)),
        ("batch pos d_model", (2, 3, 4)),
    ],
)
def test_what_is_written_is_what_was_read(how, shape):
    (row,) = HookMap.parse(f"place -> hook_x : {how} = an equation").rows
    sizes, x = {"batch": 2, "unused": 9} | ({"head": 3} if "(head" in how else {}), torch.randn(shape)
    seen = row.read(x, sizes)
    assert seen.ndim == len(row.axes.split())
    assert torch.equal(row.write(seen, sizes), x)
    assert row.equation == "an equation"


def test_one_of_several_results_is_read():
    place = Place.parse("attn @ unbind : out2")
    assert torch.equal(place.pick((), torch.arange(3).unbind(0)), torch.tensor(2))
    assert place.pick((), torch.arange(2).unbind(0)) is None
    assert Place.parse("attn : out1").pick((), torch.zeros(3)) is None


# -------------------------------------------------------------------- the kit


def with_rows(change: Callable[[str], str]) -> MapAdapter:
    class Changed(Adapter):
        def rows(self, upstream: Reader) -> str:
            return change(super().rows(upstream))

    return Changed()


def moved(old: str, new: str) -> MapAdapter:
    def change(rows: str) -> str:
        assert old in rows
        return rows.replace(old, new, 1)

    return with_rows(change)


def failing(adapter: MapAdapter, make: Any = adapt_with) -> set[str]:
    subject = Subject(Case("toy", Upstream), adapter, Upstream().eval(), make=make)
    return {one.name for one in select() if not (found := run_check(one, subject)).passed and not found.skipped}


def test_a_sound_map_passes_every_check_that_applies():
    report = check(Case("toy", Upstream), adapter=Adapter())
    assert report.passed, str(report)
    applied = {result.name for result in report.results if result.skipped is None}
    assert {result.name for result in report.results} - applied == {"spec.audit", "save.load", "preprocess"}
    assert report.certificate["parity.hooks"].detail.startswith("33 of 33")
    assert report.certificate.upstream == qualified_name(Upstream())


BROKEN = {
    "keys for queries": (moved("@ unbind        ->", "@ unbind : out1  ->"), "maps.proven"),
    "another layer's place": (moved("blocks.1 : in ", "blocks.0 : in "), "algebra"),
    "a place that only the norm reads": (moved("blocks.0 : in ", "blocks.0.norm1 : in "), "algebra"),
    "a sum that only the norm reads": (moved("blocks.1 @ add ", "blocks.1.norm2 : in "), "algebra"),
    "a dead place": (moved("blocks.0.attn.qkv             ", "blocks.0.attn : out1"), "hooks.live"),
    "a transposed pattern": (
        moved(
            f"blocks.1.attn.hook_pattern      : {SQUARE}",
            "blocks.1.attn.hook_pattern : (batch window) head k q -> batch window head q k",
        ),
        "algebra",
    ),
    "heads taken for positions": (
        moved(
            f"blocks.0.attn.hook_v           : {HEAD}", f"blocks.0.attn.hook_v : {HEAD.replace('pos head', 'head pos')}"
        ),
        "algebra",
    ),
    "the second sum for the first": (moved("blocks.0 @ add ", "blocks.0 @ add#1 "), "algebra"),
    "a call that never comes": (moved("blocks.0 @ add ", "blocks.0 @ add#2 "), "parity.hooks"),
    "rows out of order": (with_rows(lambda rows: "\n".join(reversed(rows.splitlines()))), "hooks.live"),
}


@pytest.mark.parametrize(("adapter", "caught_by"), BROKEN.values(), ids=BROKEN)
def test_a_broken_map_is_caught(adapter, caught_by):
    assert caught_by in failing(adapter)


def test_an_opened_kernel_that_nothing_vouches_for_is_caught():
    class Unproven(Adapter):
        def reference_places(self, upstream: Reader) -> HookMap:
            return HookMap((), {})

    class Unequated(Unproven):
        def equations(self, upstream: Reader, acts: Any) -> Iterator[Any]:
            yield from ()

    assert failing(Unproven()) == set()  # its equations say what scores are
    assert "parity.hooks" in failing(Unequated())


def test_a_kernel_opened_with_other_numbers_is_caught(monkeypatch):
    real = observer._unfused

    def wrong(run: Any, inside: Any, kernel: Any, q: Tensor, *rest: Any, **options: Any) -> Tensor:
        return real(run, inside, kernel, 1.01 * q, *rest, **options)

    monkeypatch.setattr(observer, "_unfused", wrong)
    assert {"parity.hooks", "hooks.live"} <= failing(Adapter())


def test_a_model_that_is_not_a_copy_is_caught():
    def shared(adapter: MapAdapter, upstream: nn.Module) -> Any:
        return adapt_with(adapter, upstream, copy=False)

    assert failing(Adapter(), shared) == {"weights.accounted"}


def test_an_output_that_is_not_upstream_s_is_caught():
    class Other(Adapter):
        def output(self, result: Any) -> Tensor:
            return 2 * super().output(result)

    assert "parity.logits" in failing(Other())
