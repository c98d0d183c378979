"""Scopes may be left in any order, anywhere and twice; a pass inside a hook is a pass of its own."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch

from prisma_core import HookError
from prisma_core.hooks.point import OPEN_SCOPES

POINT = "blocks.0.hook_resid_post"


def edit(index):
    """Edits that do not commute, so that the order in which they run shows."""
    return [lambda x, at: x * 2, lambda x, at: x + torch.arange(18), lambda x, at: x.square()][index]


def orders(n):
    """All orders in which n scopes can be entered and left."""
    steps = [(index, what) for index in range(n) for what in ("enter", "leave")]
    for order in itertools.permutations(steps):
        if all(order.index((index, "enter")) < order.index((index, "leave")) for index in range(n)):
            yield order


ORDERS = [*orders(2), *orders(3)]


@pytest.fixture
def outputs(vit, image):
    """The output after each sequence of edits, made before any scope is open."""

    def edited(indices):
        def hook(x, at):
            for index in indices:
                x = edit(index)(x, at)
            return x

        return vit.run_with_hooks(image, hooks={POINT: hook})

    known = {indices: edited(indices) for n in range(4) for indices in itertools.permutations(range(3), n)}
    return known.__getitem__


def test_there_are_96_orders_and_each_sequence_of_edits_shows(outputs):
    assert len(ORDERS) == 96
    sequences = [indices for n in range(4) for indices in itertools.permutations(range(3), n)]
    for one, two in itertools.combinations(sequences, 2):
        assert (outputs(one) - outputs(two)).abs().max() > 1e-3


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: " ".join(f"{what[0]}{index}" for index, what in order))
def test_at_each_step_the_scopes_that_are_open_run_in_the_order_of_entering(vit, image, outputs, order):
    scopes = [vit.hooks({POINT: edit(index)}) for index in range(len(order) // 2)]
    inside: list[int] = []
    for index, what in order:
        if what == "enter":
            scopes[index].__enter__()
            inside.append(index)
        else:
            scopes[index].__exit__(None, None, None)
            inside.remove(index)
        assert torch.equal(vit(image), outputs(tuple(inside)))
        assert len(vit.open_hooks().get(POINT, ())) == len(inside)
    assert OPEN_SCOPES.get() == ()


def test_caches_are_left_in_any_order_too(vit, image):
    first, second = vit.caching("z"), vit.caching("q")
    one = first.__enter__()
    two = second.__enter__()
    vit(image)
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert {name.rpartition("_")[2] for name in one} == {"z"}
    assert {name.rpartition("_")[2] for name in two} == {"q"}
    vit(image), vit(image)
    assert OPEN_SCOPES.get() == ()


def test_two_generators_step_by_step(vit, image, outputs):
    def passes(index):
        with vit.hooks({POINT: edit(index)}):
            yield vit(image)
            yield vit(image)

    pairs = list(zip(passes(0), passes(1), strict=False))
    assert torch.equal(pairs[0][0], outputs((0,)))
    for one, two in pairs[1:]:
        assert torch.equal(one, two)
    assert torch.equal(pairs[1][0], outputs((0, 1)))
    gc.collect()
    assert torch.equal(vit(image), outputs(()))
    assert not vit.open_hooks()


def test_exit_stacks_closed_in_the_order_of_opening(vit, image, outputs):
    stacks = [ExitStack() for _ in range(3)]
    for index, stack in enumerate(stacks):
        stack.enter_context(vit.hooks({POINT: edit(index)}))
    for index, stack in enumerate(stacks):
        assert torch.equal(vit(image), outputs(tuple(range(index, 3))))
        stack.close()
        stack.close()
    assert torch.equal(vit(image), outputs(()))


def test_a_scope_is_left_twice_and_entered_once(vit, image, outputs):
    scope, other = vit.hooks({POINT: edit(0)}), vit.hooks({POINT: edit(1)})
    scope.__exit__(None, None, None)  # never entered
    with scope:
        pass
    with other:
        scope.__exit__(None, None, None)
        assert torch.equal(vit(image), outputs((1,)))
    with pytest.raises(HookError, match="was entered before"), scope:
        pass
    assert OPEN_SCOPES.get() == ()


def in_thread(work):
    failures = []

    def run():
        try:
            work()
        except BaseException as failure:  # noqa: BLE001  # reported by the test
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures, failures


def test_a_scope_left_by_another_thread_is_off(vit, image, outputs):
    scope = vit.hooks({POINT: edit(0)})
    scope.__enter__()
    assert torch.equal(vit(image), outputs((0,)))
    in_thread(lambda: scope.__exit__(None, None, None))
    assert torch.equal(vit(image), outputs(()))
    assert not vit.open_hooks()
    with vit.hooks({POINT: edit(1)}):
        assert torch.equal(vit(image), outputs((1,)))
    assert OPEN_SCOPES.get() == ()


def test_a_generator_closed_by_another_thread(vit, image, outputs):
    def inside():
        with vit.hooks({POINT: edit(0)}):
            yield vit(image)

    generator = inside()
    assert torch.equal(next(generator), outputs((0,)))
    in_thread(generator.close)
    assert torch.equal(vit(image), outputs(()))


def test_a_thread_sees_a_scope_through_a_copied_context_while_it_is_open(vit, image, outputs):
    seen = []
    with vit.hooks({POINT: edit(0)}):
        context = contextvars.copy_context()
        in_thread(lambda: seen.append(vit(image)))
        in_thread(lambda: seen.append(context.run(vit, image)))
    in_thread(lambda: seen.append(context.run(vit, image)))
    for output, indices in zip(seen, ((), (0,), ()), strict=True):
        assert torch.equal(output, outputs(indices))
    assert not context.run(vit.open_hooks)


def test_tasks_have_their_own_scopes_and_forget_those_they_inherit(vit, image, outputs):
    turn = asyncio.Event

    async def alone(index, mine, others):
        with vit.hooks({POINT: edit(index)}):
            mine.set()
            await others.wait()
            output = vit(image)
        assert torch.equal(output, outputs((index,)))
        assert not vit.open_hooks()

    async def inherited(left):
        during = vit(image)
        await left.wait()
        return during, vit(image), vit.open_hooks()

    async def main():
        first, second, left = turn(), turn(), turn()
        await asyncio.gather(alone(0, first, second), alone(1, second, first))
        with vit.hooks({POINT: edit(0)}):
            task = asyncio.create_task(inherited(left))
            await asyncio.sleep(0)
        left.set()
        return await task

    during, after, hooks = asyncio.run(main())
    assert torch.equal(during, outputs((0,)))
    assert torch.equal(after, outputs(()))
    assert hooks == {}


def test_an_async_generator_closed_by_another_task(vit, image, outputs):
    async def inside():
        with vit.hooks({POINT: edit(0)}):
            yield vit(image)

    async def main():
        generator = inside()
        output = await anext(generator)
        await asyncio.create_task(generator.aclose())
        return output, vit(image)

    inner, after = asyncio.run(main())
    assert torch.equal(inner, outputs((0,)))
    assert torch.equal(after, outputs(()))


def test_a_scope_entered_by_hand_and_forgotten_goes_off(vit, image, outputs):
    vit.hooks({POINT: edit(0)}).__enter__()
    gc.collect()
    assert torch.equal(vit(image), outputs(()))
    assert OPEN_SCOPES.get() == ()


def test_nothing_is_held_by_a_scope_that_was_left(make, image):
    model = make()

    def hook(x, at):
        return x * 2

    with model.hooks({POINT: hook}), model.caching("z") as cache:
        model(image)
    gone = [weakref.ref(each) for each in (model, hook, cache)]
    del model, hook, cache
    gc.collect()
    assert [each() for each in gone] == [None] * 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, MemoryError, ValueError])
def test_an_exception_passes_and_leaves_nothing(vit, image, outputs, error):
    def broken(x, at):
        raise error

    with pytest.raises(error), vit.hooks({POINT: edit(1)}):
        vit.run_with_cache(image, hooks={("z", 1): broken})
    assert torch.equal(vit(image), outputs(()))
    assert OPEN_SCOPES.get() == ()


# -------------------------------------------------------------------- which hooks are on


def test_open_hooks_names_them_in_the_order_in_which_they_run(vit, make, image):
    def first(x, at): ...
    def second(x, at): ...
    def third(g, at): ...

    other = make(seed=4)
    assert vit.open_hooks() == {}
    with (
        vit.caching("q") as cache,
        vit.hooks({("z", 0): first, "embed": second}),
        vit.hooks({"z": second}, backward={("z", 0): third}),
        other.hooks({"z": first}),
    ):
        assert list(vit.open_hooks()) == [
            "hook_embed",
            "blocks.0.attn.hook_q",
            "blocks.0.attn.hook_z",
            "blocks.1.attn.hook_q",
            "blocks.1.attn.hook_z",
        ]
        assert vit.open_hooks()["blocks.0.attn.hook_z"] == [first, second, third]
        assert repr(vit.open_hooks()["blocks.0.attn.hook_q"]) == "[Keep('blocks.0.attn.hook_q')]"
        assert set(other.open_hooks()) == {"blocks.0.attn.hook_z", "blocks.1.attn.hook_z"}
        in_thread(lambda: check_empty(vit))
        vit(image), other(image)
    assert vit.open_hooks() == {}
    assert len(cache) == 2


def check_empty(model):
    assert model.open_hooks() == {}


def test_open_hooks_of_a_tower_are_named_from_the_tower(vit, image):
    """A scope on the whole shows in its parts: the hook point is the same."""
    from prisma_core.hooks.model import HookedModel

    class Whole(HookedModel):
        def __init__(self):
            super().__init__()
            self.vision = vit

        def forward(self, image):
            return self.vision(image)

    def hook(x, at): ...

    whole = Whole()
    with whole.hooks({("vision.z", 1): hook}):
        assert whole.open_hooks() == {"vision.blocks.1.attn.hook_z": [hook]}
        assert vit.open_hooks() == {"blocks.1.attn.hook_z": [hook]}
        whole(image)
