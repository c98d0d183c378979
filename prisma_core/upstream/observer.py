"""What happens at the places of a hook map while a hooked upstream model runs.

Nothing on the model changes during a pass. Which modules run, and which call of a function it is, stands in a context
variable, so threads do not see each other; a fused kernel is opened by a torch function mode of one thread alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prisma_core.errors import HookError, PrismaError
from prisma_core.hooks.point import HookPoint
from prisma_core.maps.places import FUSED, INSIDE, Row


class Bound:
    """A row with its hook point."""

    def __init__(self, row: Row, sizes: Mapping[str, int]):
        self.row = row
        self.sizes = sizes
        self.point = HookPoint(row.axes, row.equation)

    def through(self, x: Tensor, batch: int) -> Tensor:
        """Return upstream's tensor after the hooks of the active scope."""
        sizes = {**self.sizes, "batch": batch}
        seen = self.row.read(x, sizes)
        if seen.ndim != len(self.row.axes.split()):
            raise PrismaError(
                f"The hook map says {self.row.hook} has the axes {self.row.axes!r}; {self.row.place} "
                f"holds {list(seen.shape)}."
            )
        seen = seen.clone()
        made = self.point(seen)
        if made is seen and not (torch.is_grad_enabled() and seen.requires_grad):
            return x
        return _laid_out_as(self.row.write(made, sizes), x)


def _laid_out_as(y: Tensor, x: Tensor) -> Tensor:
    """Return a copy of y whose numbers lie in memory as those of x, so that kernels add in the same order."""
    if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        return y.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=y.dtype, device=y.device).copy_(y)


class _Frame:
    """A module that is running: its function rows, and how often each function was called."""

    def __init__(self, calls: Mapping[tuple[str, int], list[Bound]]):
        self.calls = calls
        self.seen: Counter[str] = Counter()

    def next(self, function: str) -> list[Bound]:
        number = self.seen[function]
        self.seen[function] += 1
        return self.calls.get((function, number), [])


class _Pass:
    """One pass in which hook points are wanted. While hooks run, what they call is not looked at."""

    def __init__(self, wanted: list[Bound], batch: int):
        self.wanted = frozenset(wanted)
        self.batch = batch
        self.functions = any(bound.row.place.function for bound in wanted)
        self.frames: list[_Frame] = []
        self.paused = False

    def through(self, places: list[Bound], given: Any) -> Any:
        """Return a call's arguments or result with the tensors at these places replaced by what hooks make of them."""
        for bound in places:
            if bound not in self.wanted:
                continue
            place = bound.row.place
            several = isinstance(given, tuple)
            x: Any = place.pick(given, given)
            if x is None:
                raise PrismaError(f"No tensor passes {place}; the hook map names it for {bound.row.hook}.")
            self.paused = True
            try:
                y = bound.through(x, self.batch)
            finally:
                self.paused = False
            if y is not x:
                given = (*given[: place.index], y, *given[place.index + 1 :]) if several else y
        return given


_PASS: ContextVar[_Pass | None] = ContextVar("prisma_pass", default=None)


class Tap:
    """What is read and written at one module."""

    def __init__(self, bound: list[Bound]):
        places = [(one, one.row.place) for one in bound]
        self.before = [one for one, place in places if place.function is None and place.side.startswith("in")]
        self.after = [one for one, place in places if place.function is None and not place.side.startswith("in")]
        self.calls: dict[tuple[str, int], list[Bound]] = {}
        for one, place in places:
            if place.function is not None:
                self.calls.setdefault((place.function, place.call), []).append(one)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        run = _PASS.get()
        if run is None or run.paused:
            return None
        if self.before:
            args = run.through(self.before, args)
        if run.functions:
            run.frames.append(_Frame(self.calls))
        return args

    def leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        run = _PASS.get()
        if run is None or run.paused:
            return None
        if run.functions:
            run.frames.pop()
        return run.through(self.after, result) if self.after else None


class _Functions(TorchFunctionMode):
    """Sees every torch function of a pass, and runs the hooks of those the table names."""

    def __init__(self, run: _Pass):
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = self.run
        kwargs = cast("dict[str, Any]", kwargs or {})
        if run.paused or not run.frames:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        places = [bound for bound in run.frames[-1].next(name) if bound in run.wanted]
        if not places:
            return func(*args, **kwargs)
        sides = {bound: bound.row.place.side for bound in places}
        args = run.through([bound for bound in places if sides[bound].startswith("in")], tuple(args))
        if inside := {sides[bound]: bound for bound in places if sides[bound] in INSIDE}:
            result = _opened(run, inside, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        return run.through([bound for bound in places if sides[bound].startswith("out")], result)


def _opened(
    run: _Pass,
    inside: Mapping[str, Bound],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what the fused kernel returns, computed step by step, scores and pattern shown to their hooks."""

    def shown(side: str, x: Tensor) -> Tensor:
        if side not in inside:
            return x
        run.paused = True
        try:
            return inside[side].through(x, run.batch)
        finally:
            run.paused = False

    if dropout_p:
        raise HookError(f"Attention drops patterns at random here; {FUSED} can be opened in evaluation only.")
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return shown("pattern", shown("scores", scores).softmax(-1)) @ v


@contextmanager
def watching(wanted: list[Bound], batch: int) -> Generator[None]:
    """Run the hooks of these hook points in what the model computes inside.

    Args:
        batch: how many inputs there are.
    """
    run = _Pass(wanted, batch)
    token = _PASS.set(run)
    try:
        if run.functions:
            with _Functions(run):
                yield
        else:
            yield
    finally:
        _PASS.reset(token)
