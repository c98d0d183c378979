"""Random programs over scopes, against a model of what should be on: any order, context, generator, hook, cache."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prisma_core.errors import HookError
from prisma_core.hooks.model import HookedModel
from prisma_core.hooks.point import HookPoint

IMAGE = torch.ones(1, dtype=torch.float64)
POINTS = ("hook_a", "hook_b", "hook_c")
STEPS = 300 if settings.default is not None and settings.default.max_examples > 100 else 40


class Line(HookedModel):
    """Three hook points in a row, each after a sum."""

    def __init__(self) -> None:
        super().__init__()
        for name in POINTS:
            setattr(self, name, HookPoint("batch", f"{name} in a row"))

    def forward(self, x: Tensor) -> Tensor:
        for name in POINTS:
            x = getattr(self, name)(x + 1)
        return x


@dataclass(eq=False)
class Expected:
    """What a scope does, and what should be known of it.

    Attributes:
        at: by hook point, a factor of a hook, or None for what a cache reads.
        cached: what the cache should hold.
        reached: the hook points that passes went by.
        completed: whether a pass ran to its end in it.
        then: what its hook does besides to other scopes.
    """

    number: int
    at: dict[str, float | None]
    scope: Any = None
    cache: Any = None
    is_open: bool = False
    cached: dict[str, float] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    completed: bool = False
    then: Callable[[], None] = lambda: None


class TwiceError(Exception):
    """The expected end of a pass that fills a cache a second time."""


class World:
    """A model, contexts (threads and tasks), scopes, and the plain account of them.

    Attributes:
        seen: by context, the scopes it knows, in the order of opening; copies of a context know what the first knew.
        log: what hooks saw, in order.
    """

    def __init__(self) -> None:
        self.model = Line()
        self.contexts: list[Context] = [Context()]
        self.seen: list[list[Expected]] = [[]]
        self.scopes: list[Expected] = []
        self.log: list[tuple[int, str, float]] = []
        self.awaited: list[tuple[int, str, float]] = []
        self.here = 0  # the context in which a step runs

    # ------------------------------------------------------------ what should happen

    def visible(self) -> list[Expected]:
        return [each for each in self.seen[self.here] if each.is_open]

    def foretold(self, x: float, last: str | None = None, raises: bool = False) -> float:
        """Return the output of a pass in the context of the step, and note what hooks should see.

        Of a pass that a cache stops at the ``last`` hook point, or a hook of it ``raises`` at, what is there by then.
        """
        for point in POINTS:
            x += 1
            scopes = self.visible()
            for scope in scopes:
                factor = scope.at.get(point)
                if scope.is_open and factor is not None:
                    self.awaited.append((scope.number, point, x))
                    scope.reached.add(point)
                    x *= factor
                    scope.then()
            if point == last and raises:
                return x
            for scope in scopes:
                if scope.is_open and point in scope.at and scope.at[point] is None:
                    if point in scope.cached:
                        raise TwiceError
                    scope.cached[point] = x
                    scope.reached.add(point)
            if point == last:
                return x
        for scope in self.visible():
            scope.completed = True
        return x

    # ------------------------------------------------------------ steps

    def run(self, step: Callable[[], None], thread: bool) -> None:
        """Run a step in the context of the moment, in a thread of its own or not."""
        context = self.contexts[self.here]
        if thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(context.run, step).result()
        else:
            context.run(step)

    def fork(self) -> None:
        self.contexts.append(self.contexts[self.here].copy())
        self.seen.append(list(self.seen[self.here]))

    def hook(self, scope: Expected, factor: float) -> Callable[[Tensor, Any], Tensor]:
        def act(x: Tensor, at: Any) -> Tensor:
            self.log.append((scope.number, at.name, float(x)))
            return x * factor

        return act

    def open(self, at: dict[str, float | None], how: str) -> None:
        scope = Expected(len(self.scopes), at, is_open=True)
        self.scopes.append(scope)
        self.seen[self.here].append(scope)
        self.enter(scope, how)

    def enter(self, scope: Expected, how: str) -> None:
        """Open a scope for what is expected of it."""
        factors = {name: self.hook(scope, factor) for name, factor in scope.at.items() if factor is not None}
        made = self.model.hooks(factors) if factors else self.model.caching(list(scope.at))
        if how == "generator":

            def inside() -> Generator[Any, None, None]:
                with made as value:
                    yield value

            scope.scope = inside()
            scope.cache = next(scope.scope)
        else:
            scope.scope = made
            scope.cache = made.__enter__()

    def left(self, scope: Expected, error: Exception | None) -> None:
        """Leave a scope, open or not."""
        if isinstance(scope.scope, Generator):
            scope.scope.close()
        elif scope.scope is not None:
            scope.scope.__exit__(type(error) if error else None, error, None)

    def close(self, scope: Expected, how: str) -> None:
        missed = [point for point in scope.at if point not in scope.reached]
        fails = (
            scope.is_open and scope.completed and missed and how == "leave" and not isinstance(scope.scope, Generator)
        )
        scope.is_open = False
        if how == "forget":  # nobody holds it any more
            scope.scope = None
        elif fails:
            with pytest.raises(HookError, match="|".join(missed)):
                self.left(scope, None)
        else:
            self.left(scope, ValueError() if how == "error" else None)

    def plain(self) -> None:
        self.compare(lambda: self.model(IMAGE))

    def stopped(self, point: str) -> None:
        """Run a pass that stops at a hook point."""
        names = {"names": point, "output": False}
        self.compare(lambda: self.model.run_with_cache(IMAGE, **names)[1][point], point)

    def broken(self, point: str, error: type[BaseException]) -> None:
        """Run a pass in which a hook raises."""

        def act(x: Tensor, at: Any) -> None:
            raise error

        def run() -> Tensor:
            seen = list[Tensor]()
            with pytest.raises(error), self.model.hooks({point: lambda x, at: seen.append(x)}):
                self.model.run_with_hooks(IMAGE, hooks={point: act})
            return seen[0]

        self.compare(run, point, raises=True)

    def compare(self, run: Callable[[], Tensor], last: str | None = None, *, raises: bool = False) -> None:
        """Run a pass, and compare its output or error with what is expected."""
        try:
            expected = self.foretold(float(IMAGE), last, raises)
        except TwiceError:
            with pytest.raises(HookError, match="fired twice"):
                run()
        else:
            assert float(run()) == expected

    def inner(self, point: str, change: tuple[Any, ...]) -> None:
        """Run a pass with a hook that runs passes of its own, and then opens or closes another scope.

        In its passes no scope of the model is on; what it opened stays on.
        """
        outputs, before, last = list[float](), list[float](), Expected(-1, {point: 1.0})

        def known() -> None:
            before.append(self.awaited.pop()[-1])
            last.is_open = False
            if change[0] == "close" and self.scopes:
                self.scopes[change[1] % len(self.scopes)].is_open = False
            elif change[0] == "open":
                new = Expected(len(self.scopes), change[1], is_open=True)
                self.scopes.append(new)
                self.seen[self.here].append(new)

        def act(x: Tensor, at: Any) -> None:
            outputs.append(float(self.model(x)))
            _, cache = self.model.run_with_cache(x)
            outputs.append(float(cache[POINTS[-1]]))
            if change[0] == "close" and self.scopes:
                self.left(self.scopes[change[1] % len(self.scopes)], ValueError())
            elif change[0] == "open":
                self.enter(self.scopes[-1], "enter")

        last.is_open, last.then = True, known
        self.seen[self.here].append(last)
        self.compare(lambda: self.model.run_with_hooks(IMAGE, hooks={point: act}))
        self.seen[self.here].remove(last)
        assert outputs == [x + len(POINTS) for x in before for _ in range(2)]

    def check(self) -> None:
        """Compare what is on, what hooks saw, and what caches hold."""
        assert self.log == self.awaited
        for index, context in enumerate(self.contexts):
            self.here = index
            number = {point: sum(point in each.at for each in self.visible()) for point in POINTS}
            hooks = context.run(self.model.open_hooks)
            assert {point: len(hooks.get(point, ())) for point in POINTS} == number
        for scope in self.scopes:
            if scope.cache is not None:
                assert {name: float(x) for name, x in scope.cache.items()} == scope.cached


FACTORS = st.sampled_from([2.0, 0.5, -3.0])
PLACES = st.dictionaries(st.sampled_from(POINTS), FACTORS, min_size=1) | st.dictionaries(
    st.sampled_from(POINTS), st.none(), min_size=1
)
STEP = st.one_of(
    st.tuples(st.just("open"), PLACES, st.sampled_from(["enter", "generator"])),
    st.tuples(st.just("close"), st.integers(0, 400), st.sampled_from(["leave", "error", "forget"])),
    st.tuples(st.just("pass"), st.none(), st.none()),
    st.tuples(st.just("stopped"), st.sampled_from(POINTS), st.none()),
    st.tuples(st.just("broken"), st.sampled_from(POINTS), st.sampled_from([ValueError, KeyboardInterrupt])),
    st.tuples(
        st.just("inner"),
        st.sampled_from(POINTS),
        st.one_of(
            st.tuples(st.just("nothing")),
            st.tuples(st.just("close"), st.integers(0, 400)),
            st.tuples(st.just("open"), PLACES),
        ),
    ),
    st.tuples(st.just("fork"), st.none(), st.none()),
)
PROGRAM = st.lists(st.tuples(STEP, st.integers(0, 5), st.booleans()), min_size=STEPS // 2, max_size=STEPS)


@given(PROGRAM)
def test_what_is_on_is_what_a_plain_account_says(program: list[Any]) -> None:
    world = World()
    for (kind, first, second), where, thread in program:
        world.here = where % len(world.contexts)
        if kind == "open":
            world.run(lambda first=first, second=second: world.open(first, second), thread)
        elif kind == "close" and world.scopes:
            scope = world.scopes[first % len(world.scopes)]
            world.run(lambda scope=scope, second=second: world.close(scope, second), thread)
        elif kind == "pass":
            world.run(world.plain, thread)
        elif kind == "stopped":
            world.run(lambda first=first: world.stopped(first), thread)
        elif kind == "broken":
            world.run(lambda first=first, second=second: world.broken(first, second), thread)
        elif kind == "inner":
            world.run(lambda first=first, second=second: world.inner(first, second), thread)
        elif kind == "fork" and len(world.contexts) < 6:
            world.fork()
        world.check()
    for scope in world.scopes:
        world.here = 0
        world.run(lambda scope=scope: world.close(scope, "error"), False)
    world.check()
    for context in world.contexts:
        assert context.run(world.model.open_hooks) == {}
