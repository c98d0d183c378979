"""Observation of an upstream module at places of a hook map, while it runs its own code.

``attach`` registers torch hooks at the modules of those places. They act only under ``watching``, whose state stands in
a context variable: nothing on the module changes during a pass, and threads do not see each other. Functions are seen,
and fused kernels replaced, by a torch function mode of one thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from prisma_core.errors import HookError
from prisma_core.hooks.recompute import checkpoints, keep
from prisma_core.maps.places import FUSED, INSIDE, Place
from prisma_core.maps.reader import Reader
from prisma_core.toolbox.precision import show, softmax, unrounded, widened
from prisma_core.toolbox.query_rows import Rows


class Observer(ABC):
    """Base of what reads, and may replace, the tensor at one place.

    Attributes:
        place: of an upstream module.
    """

    place: Place

    @abstractmethod
    def passed(self, x: Tensor, batch: int) -> Tensor:
        """Read the tensor at the place; return it, or the one with which upstream goes on.

        Args:
            x: upstream's own tensor, which upstream may edit in place later.
            batch: how many inputs the pass has.
        """

    def rows(self) -> Rows | None:
        """Return the queries whose rows of scores or a pattern are all that is read here; None for all rows."""
        return None

    def store(self, rows: Rows, x: Tensor, batch: int) -> None:
        """Store the rows, which ``rows`` returned, of scores or a pattern."""
        raise NotImplementedError

    @abstractmethod
    def missed(self) -> None:
        """Report that the module or function ran, and that no tensor stood at the place."""


class ModuleHooks:
    """Torch hooks of one module: they run its observers, and count the functions that it calls."""

    def __init__(self, observers: Sequence[Observer]):
        modules = [one for one in observers if one.place.function is None]
        self.before = [one for one in modules if one.place.side.startswith("in")]
        self.after = [one for one in modules if one.place.side.startswith("out")]
        self.calls: dict[tuple[str, int], list[Observer]] = {}
        for one in observers:
            if one.place.function is not None:
                self.calls.setdefault((one.place.function, one.place.call), []).append(one)

    def place(self, module: nn.Module, *, functions: bool) -> list[RemovableHandle]:
        """Register the hooks. What further hooks compute is no function that the module, or its parent, calls."""
        handles: list[RemovableHandle] = []
        parts = vars(module)
        self.hooked = functions and bool(parts["_forward_pre_hooks"] or parts["_forward_hooks"])
        if self.hooked:
            handles.append(module.register_forward_pre_hook(self.arrive, prepend=True))
            handles.append(module.register_forward_hook(self.finish, prepend=True))
        handles.append(module.register_forward_pre_hook(self.enter))
        handles.append(module.register_forward_hook(self.leave))
        return handles

    def arrive(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if (run := _PASS.get()) is not None and run.functions and not run.paused:
            run.frames.append(_Frame({}))

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        run = _PASS.get()
        if run is None or run.paused:
            return None
        if self.before:
            args = run.observe(self.before, args)
        if run.functions:
            if self.hooked:
                run.frames.pop()
            run.frames.append(_Frame(self.calls))
        return args

    def finish(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if (run := _PASS.get()) is not None and run.functions and not run.paused:
            run.frames[-1] = _Frame({})

    def leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        run = _PASS.get()
        if run is None or run.paused:
            return None
        if run.functions:
            run.frames.pop()
        return run.observe(self.after, result) if self.after else None


def attach(upstream: nn.Module, observers: Iterable[Observer]) -> list[RemovableHandle]:
    """Register torch hooks for observers; return the handles that remove them.

    Raises:
        UnsupportedArchitecture: upstream has no module of that name, or it runs no hooks.
    """
    by_module: dict[str, list[Observer]] = {}
    for one in observers:
        by_module.setdefault(one.place.module, []).append(one)
    modules = dict(cast("Iterator[tuple[str, nn.Module]]", upstream.named_modules()))
    if missing := sorted(set(by_module) - set(modules)):
        path = missing[0]
        while path not in modules:
            path = path.rpartition(".")[0]
        part = missing[0][len(path) :].lstrip(".")
        raise Reader(modules[path], path).unsupported(f"it has no module {part!r}; the hook map names it")
    # A function belongs to the innermost module that runs, so each module has to be followed.
    functions = any(one.place.function for several in by_module.values() for one in several)
    handles: list[RemovableHandle] = []
    for name, module in modules.items():
        if functions or name in by_module:
            if isinstance(module, torch.jit.ScriptModule):
                raise Reader(module, name).unsupported("compiled code, which runs no hooks")
            handles += ModuleHooks(by_module.get(name, [])).place(module, functions=functions)
    return handles


class _Frame:
    """A module that is running: its observers of functions, and how often it has called each function."""

    def __init__(self, calls: Mapping[tuple[str, int], list[Observer]]):
        self.calls = calls
        self.counts: Counter[str] = Counter()

    def next(self, function: str) -> list[Observer]:
        number = self.counts[function]
        self.counts[function] += 1
        return self.calls.get((function, number), [])


class _Pass:
    """State of one pass, or of what is computed again of it, under ``watching``; paused while an observer runs."""

    def __init__(self, observers: Iterable[Observer], batch: int, again: bool):
        self.active = frozenset(observers)
        self.began = checkpoints()
        self.again = again
        self.batch = batch
        self.functions = any(one.place.function for one in self.active)
        self.frames: list[_Frame] = []
        self.paused = False

    def observe(self, observers: list[Observer], value: Any) -> Any:
        """Run observers on a call's arguments or result; return it with the tensors that they put in its place."""
        for one in observers:
            if one not in self.active:
                continue
            x = one.place.pick(value, value)
            if x is None:
                one.missed()
                continue
            y = self.show(one, x)
            if y is not x:
                index = one.place.index
                value = (*value[:index], y, *value[index + 1 :]) if isinstance(value, tuple) else y
        return value

    def show(self, observer: Observer, x: Tensor) -> Tensor:
        with self.shown():
            return observer.passed(x, self.batch)

    @contextmanager
    def shown(self) -> Generator[None]:
        """Pause, and have a checkpointed part of the pass observed when it is computed again."""
        keep(checkpoints(), self, self.began, lambda: partial(watching, self.active, self.batch, again=True))
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


_PASS: ContextVar[_Pass | None] = ContextVar("prisma_pass", default=None)


@contextmanager
def watching(observers: Iterable[Observer], batch: int, *, again: bool = False) -> Generator[None]:
    """Run these observers, which ``attach`` has placed, in what is computed inside.

    Args:
        batch: how many inputs there are.
        again: a checkpointed part of a pass is computed again, for gradients.
    """
    run = _Pass(observers, batch, again)
    token = _PASS.set(run)
    try:
        if run.functions:
            with _Functions(run):
                yield
        else:
            yield
    finally:
        _PASS.reset(token)


class _Functions(TorchFunctionMode):
    """Sees every torch function of a pass, and runs the observers of its arguments and results."""

    def __init__(self, run: _Pass):
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = self.run
        kwargs = cast("dict[str, Any]", kwargs or {})
        if run.paused or not (run.frames or run.again):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        if not run.frames:
            if name in (one.place.function for one in run.active):
                raise HookError(
                    f"Upstream checkpoints a function that calls {name}, in which there are hook points, and no "
                    "module: which call it is cannot be known when it runs again. Switch checkpointing off for this "
                    "pass."
                )
            return func(*args, **kwargs)
        observers = [one for one in run.frames[-1].next(name) if one in run.active]
        if not observers:
            return func(*args, **kwargs)
        args = run.observe([one for one in observers if one.place.side.startswith("in")], tuple(args))
        if inside := {one.place.side: one for one in observers if one.place.side in INSIDE}:
            result = _unfused(run, inside, func, *args, **kwargs)
        else:
            result = func(*args, **kwargs)
        return run.observe([one for one in observers if one.place.side.startswith("out")], result)


def _unfused(
    run: _Pass,
    inside: Mapping[str, Observer],
    kernel: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute ``scaled_dot_product_attention`` step by step, its scores and pattern shown to their observers.

    Where these only keep some queries' rows, the rows are computed beside the kernel. Half dtypes are computed in
    float32, as the kernel does.
    """
    if dropout_p:
        raise HookError(f"Attention drops patterns at random here; {FUSED} can be opened in evaluation only.")
    dtype, rows = query.dtype, Rows.common([one.rows() for one in inside.values()])
    q, k, v, mask = query, key, value, attn_mask
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if rows is not None:
        q, mask = rows.of(q), mask if mask is None or mask.shape[-2] == 1 else rows.of(mask)
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    with unrounded(q):
        scores = (widened(q) * (q.shape[-1] ** -0.5 if scale is None else scale)) @ widened(k).transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if rows is None:
        shown = {side: partial(show, partial(run.show, one), dtype=dtype) for side, one in inside.items()}
        scores = shown["scores"](scores) if "scores" in shown else scores
        pattern = softmax(scores)
        pattern = shown["pattern"](pattern) if "pattern" in shown else pattern
        with unrounded(pattern):
            return (pattern @ widened(v)).to(dtype)
    for side, made in (("scores", lambda: scores), ("pattern", lambda: softmax(scores))):
        if side in inside:
            with run.shown():
                inside[side].store(rows, made().to(dtype), run.batch)
    return kernel(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
