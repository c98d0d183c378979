"""Hooked models that have a hook map and no canonical form: upstream's own module runs, hooked at the places mapped."""

from __future__ import annotations

import copy as copying
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prisma_core.errors import HookError, InputError, PrismaError
from prisma_core.hookmap import FUSED, INSIDE, HookMap, Row
from prisma_core.hooks import HookPoint
from prisma_core.spec import MapSpec
from prisma_core.transformer.canonical import Canonical, Size


class HookedUpstream(Canonical):
    """An upstream module with hook points at the places a hook map names.

    It runs upstream's own code on upstream's own kernels. A place costs something in a pass only if it is asked for:
    then a copy of what passes there is made, for upstream may go on to edit it.

    Args:
        upstream: a module of its own: it is changed.
        table: one row for each hook point, in the order in which they fire, each with its axes.
        spec: what the model takes.
        output: from what upstream returns to the tensor that is its main output.

    Attributes:
        upstream: the module; its parameters are the model's.
    """

    def __init__(self, upstream: nn.Module, table: HookMap, spec: MapSpec, output: Callable[[Any], Tensor]):
        super().__init__()
        self.spec: MapSpec = spec
        self.upstream = upstream
        self._output = output
        self._bound = _bound(table)
        for bound in self._bound:
            _put(self, bound)
        taps = {name: _Tap(bound) for name, bound in _by_module(self._bound).items()}
        functions = any(bound.row.place.function for bound in self._bound)
        modules = dict(cast("Iterator[tuple[str, nn.Module]]", upstream.named_modules()))
        if missing := sorted(set(taps) - set(modules)):
            raise PrismaError(f"The upstream model has no module {missing[0]!r}; the hook map names it.")
        for name, module in modules.items():
            if functions or name in taps:  # a function belongs to the innermost module, so each has to be followed
                tap = taps.get(name) or _Tap([])
                module.register_forward_pre_hook(tap.enter)
                module.register_forward_hook(tap.leave)
        self.eval()

    def forward(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Return upstream's main output."""
        wanted = [bound for bound in self._bound if bound.point.wanted]
        if not wanted:
            return self._output(self.upstream(*inputs, **kwargs))
        if torch.compiler.is_compiling():
            raise HookError(
                f"Hooks at {wanted[0].row.hook} cannot run in a compiled model of this kind; run it eagerly."
            )
        run = _Pass(wanted, _batch(inputs, kwargs))
        token = _PASS.set(run)
        try:
            with ExitStack() as stack:
                if run.functions:
                    stack.enter_context(_Functions(run))
                return self._output(self.upstream(*inputs, **kwargs))
        finally:
            _PASS.reset(token)

    def sizes(self) -> list[Size]:
        shape = self.spec.shape
        return [shape[1:] if len(shape) > 1 else shape, *self.spec.sizes]

    def sample_inputs(
        self, batch: int = 1, *, size: Size | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        shape = self.spec.shape
        if size is not None:
            if len(size) > len(shape):
                raise InputError(
                    f"Expected a size of at most {len(shape)} axes, as in {list(shape)}; got {list(size)}."
                )
            shape = (*shape[: len(shape) - len(size)], *size)
        return (torch.randn(batch, *shape, generator=generator),)

    def export(self) -> dict[str, Tensor]:
        """Return upstream's own state dict with the model's present weights."""
        return {name: tensor.detach().contiguous() for name, tensor in self.upstream.state_dict().items()}


def own_copy(upstream: nn.Module, *, copy: bool) -> nn.Module:
    """Return a module like upstream, its tensors copied or shared; the module itself is always another."""
    tensors = [*upstream.parameters(), *upstream.buffers()]
    return copying.deepcopy(upstream, {} if copy else {id(tensor): tensor for tensor in tensors})


# -------------------------------------------------------------------- rows bound to hook points


class _Bound:
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


def _bound(table: HookMap) -> list[_Bound]:
    rows = table.plain()
    twice = [name for name, n in Counter(row.hook for row in rows).items() if n > 1]
    if twice:
        raise PrismaError(f"The hook map has several rows for {twice[0]}: only one place can be written.")
    for row in rows:
        if not row.axes or "(" in row.axes:
            raise PrismaError(
                f"The row of {row.hook} must name its axes, one word each: 'PLACE -> {row.hook} : batch pos d_model', "
                f"or as the right side of its einops. Got {row.how!r}."
            )
    return [_Bound(row, table.sizes) for row in rows]


class Part(nn.Module):
    """Holds hook points under the name of a part of the model; computes nothing."""


def _put(model: nn.Module, bound: _Bound) -> None:
    """Make a hook point an attribute of a part at the path that its name says, where hooked models look for them."""
    *path, last = bound.row.hook.split(".")
    part = model
    for name in path:
        if name not in dict(part.named_children()):
            part.add_module(name, Part())
        part = part.get_submodule(name)
    if not isinstance(part, Part) and part is not model:
        raise PrismaError(f"{bound.row.hook} is no name for a hook point: {path[0]} is the model's own.")
    setattr(part, last, bound.point)


def _by_module(bound: Iterable[_Bound]) -> dict[str, list[_Bound]]:
    found: dict[str, list[_Bound]] = {}
    for one in bound:
        found.setdefault(one.row.place.module, []).append(one)
    return found


# -------------------------------------------------------------------- a pass


class _Frame:
    """A module that is running: its function rows, and how often each function was called."""

    def __init__(self, calls: Mapping[tuple[str, int], list[_Bound]]):
        self.calls = calls
        self.seen: Counter[str] = Counter()

    def next(self, function: str) -> list[_Bound]:
        number = self.seen[function]
        self.seen[function] += 1
        return self.calls.get((function, number), [])


class _Pass:
    """One pass in which hook points are wanted. While hooks run, what they call is not looked at."""

    def __init__(self, wanted: list[_Bound], batch: int):
        self.wanted = frozenset(wanted)
        self.batch = batch
        self.functions = any(bound.row.place.function for bound in wanted)
        self.frames: list[_Frame] = []
        self.paused = False

    def through(self, places: list[_Bound], given: Any) -> Any:
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


class _Tap:
    """What is read and written at one module."""

    def __init__(self, bound: list[_Bound]):
        places = [(one, one.row.place) for one in bound]
        self.before = [one for one, place in places if place.function is None and place.side.startswith("in")]
        self.after = [one for one, place in places if place.function is None and not place.side.startswith("in")]
        self.calls: dict[tuple[str, int], list[_Bound]] = {}
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
    inside: Mapping[str, _Bound],
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


def _batch(inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    return next((x.shape[0] for x in (*inputs, *kwargs.values()) if isinstance(x, Tensor) and x.ndim), 1)


__all__ = ["HookedUpstream", "own_copy"]
