"""Splices: functions in the place of activations, whose hook points are the model's while their scope is open."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prisma_conformance.checks.live import live
from torch import Tensor

import prisma_core as prisma
from prisma_core import HookedViT, HookError, HookPoint, UnknownName

AT = "blocks.1.hook_resid_post"


class Twice:
    """Doubles an activation in two steps, each with a hook point."""

    def __init__(self, axes: str = "batch pos d_model") -> None:
        self.half = HookPoint(axes, "the half that is added")
        self.whole = HookPoint(axes, "the sum")

    @property
    def points(self) -> Mapping[str, HookPoint]:
        return {"twice.hook_half": self.half, "twice.hook_whole": self.whole}

    def __call__(self, x: Tensor) -> Tensor:
        return self.whole(x + self.half(x))


class InPlace:
    """Edits what it is given."""

    points: Mapping[str, HookPoint] = {}

    def __call__(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.fixture(scope="module")
def model() -> HookedViT:
    return prisma.load("toy:scenes-3l")


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_a_splice_is_what_a_hook_that_computes_the_same_is(model: HookedViT, image: Tensor) -> None:
    by_hook = model.run_with_hooks(image, hooks={AT: lambda x, at: x + x})
    with model.splicing({("resid_post", 1): Twice()}):
        assert torch.equal(model(image), by_hook)
    assert not torch.equal(model(image), by_hook)


def test_its_hook_points_are_named_cached_hooked_and_differentiated_like_any_other(
    model: HookedViT, image: Tensor
) -> None:
    before = list(model.hook_points())
    with model.splicing({AT: Twice()}):
        names = list(model.hook_points())
        assert [name for name in names if name not in before] == [f"{AT}.twice.hook_half", f"{AT}.twice.hook_whole"]
        assert names.index(f"{AT}.twice.hook_whole") + 1 == names.index(AT)
        assert model.resolve(("twice.half", 1)) == model.resolve("half") == [f"{AT}.twice.hook_half"]
        _, cache = model.run_with_cache(image, names=["half", AT], loss=lambda logits: logits[:, 3].sum())
        torch.testing.assert_close(cache[AT], 2 * cache["half", 1])
        torch.testing.assert_close(cache.grad[AT], cache.grad["half", 1])  # what reads the sum reads the half once
        without = model.run_with_hooks(image, hooks={("half", 1): lambda x, at: x * 0})
    torch.testing.assert_close(without, model(image))


def test_nothing_is_left_behind_and_other_threads_see_nothing(model: HookedViT, image: Tensor) -> None:
    names, modules = list(model.hook_points()), [name for name, _ in model.named_modules()]
    clean, seen = model(image), {}

    def elsewhere() -> None:
        seen["names"], seen["logits"] = list(model.hook_points()), model(image)

    with model.splicing({AT: Twice()}):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert [name for name, _ in model.named_modules()] == modules
    assert seen["names"] == names == list(model.hook_points())
    assert torch.equal(seen["logits"], clean)
    assert torch.equal(model(image), clean)
    with pytest.raises(UnknownName, match="half"):
        model.resolve("half")
    with pytest.raises(RuntimeError, match="on purpose"), model.splicing({AT: Twice()}):
        raise RuntimeError("on purpose")
    assert torch.equal(model(image), clean)
    assert not any(point.wanted for point in model.hook_points().values())


def test_scopes_around_a_splice_come_before_it_and_those_inside_after(model: HookedViT, image: Tensor) -> None:
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        return lambda x, at: seen.update({name: x.clone()})

    with model.hooks({AT: note("outside")}), model.splicing({AT: Twice()}), model.hooks({AT: note("inside")}):
        model(image)
    torch.testing.assert_close(seen["inside"], 2 * seen["outside"])


def test_what_reads_for_a_splice_gets_what_hooks_made(model: HookedViT, image: Tensor) -> None:
    seen: list[Tensor] = []
    read = "blocks.1.ln2.hook_normalized"
    with model.splicing({AT: Twice()}, reads={read: seen.append}):
        model.run_with_hooks(image, hooks={read: lambda x, at: torch.ones_like(x)})
    assert len(seen) == 1
    assert seen[0].unique().tolist() == [1.0]


def test_a_pass_inside_a_hook_is_not_spliced(model: HookedViT, image: Tensor) -> None:
    clean, inner = model(image), list[Tensor]()
    with model.splicing({AT: Twice()}):
        model.run_with_hooks(image, hooks={"half": lambda x, at: inner.append(model(image))})
    assert torch.equal(inner[0], clean)


@pytest.mark.parametrize(
    ("splice", "words"),
    [
        (lambda x: x[:, 1:], "expected the activation's"),
        (lambda x: x.double(), "float64"),
        (lambda x: None, "NoneType"),
    ],
)
def test_what_does_not_fit_in_the_place_is_refused(model: HookedViT, image: Tensor, splice: Any, words: str) -> None:
    broken = type("Broken", (), {"points": {}, "__call__": lambda self, x: splice(x)})()
    with pytest.raises(HookError, match=words), model.splicing({AT: broken}):
        model(image)


def test_two_splices_at_one_place_and_ones_that_are_not_reached_are_refused(model: HookedViT, image: Tensor) -> None:
    with model.splicing({AT: Twice()}), pytest.raises(HookError, match="spliced already"):
        model.splicing({AT: Twice()})
    with pytest.raises(UnknownName, match="3 hook points"):
        model.splicing({"resid_post": Twice()})
    with pytest.raises(HookError, match=r"blocks\.1\.hook_resid_post was not reached"), model.splicing({AT: Twice()}):
        model(image, stop_at_layer=1)


def test_open_hooks_shows_splices(model: HookedViT) -> None:
    twice = Twice()
    with model.splicing({AT: twice}):
        assert model.open_hooks() == {AT: [twice]}


def test_hook_points_of_splices_pass_the_kits_check_of_liveness(image: Tensor) -> None:
    model, image = prisma.load("toy:scenes-3l", dtype=torch.float64), image.double()

    def subject(model: HookedViT) -> Any:
        def generator(seed: int) -> torch.Generator:
            return torch.Generator().manual_seed(seed)

        return SimpleNamespace(fresh_model=lambda: model, inputs=lambda n=2: (image[:n],), generator=generator)

    with model.splicing({AT: Twice(), "blocks.0.hook_mlp_out": Twice()}):
        finding = live(subject(model))
        assert not finding.problems
        assert finding.detail.startswith(f"{len([n for n, p in model.hook_points().items() if not p.derived])} ")

    class Deaf(Twice):
        def __call__(self, x: Tensor) -> Tensor:
            self.half(x)
            return self.whole(x + x)

    with model.splicing({AT: Deaf()}):
        assert any("hook_half" in problem for problem in live(subject(model)).problems)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("place", [AT, "blocks.1.attn.hook_q", "blocks.1.ln2.hook_normalized"])
def test_edits_in_place_of_a_splice_and_of_what_reads_reach_nothing_else(
    model: HookedViT, place: str, gradients: bool
) -> None:
    image, before = model.sample_inputs()[0], "blocks.0.hook_resid_post"  # before all places
    with torch.set_grad_enabled(gradients):
        expected, cache = model.run_with_cache(image)
        with model.caching() as first, model.splicing({place: InPlace()}, reads={before: lambda x: x.zero_()}):
            model(image)
        with model.splicing({}, reads={before: lambda x: x.zero_()}):
            torch.testing.assert_close(model(image), expected)
    torch.testing.assert_close(first[before], cache[before])


def test_what_a_splice_holds_on_to_is_not_what_a_cache_holds(model: HookedViT, image: Tensor) -> None:
    kept: list[Tensor] = []

    class Keeping(Twice):
        def __call__(self, x: Tensor) -> Tensor:
            kept.append(super().__call__(x))
            return kept[-1]

    with model.splicing({AT: Keeping()}):
        _, cache = model.run_with_cache(image, names=[AT])
    before = cache[AT].clone()
    kept[0].zero_()
    assert before.any()
    assert torch.equal(cache[AT], before)
