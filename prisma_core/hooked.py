"""What every hooked model can do: list its hook points, open scopes, run with hooks, run with a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from prisma_core.cache import ActivationCache
from prisma_core.errors import HookError
from prisma_core.hooks import Capture, Hook, HookContext, HookPoint, Scope, Stop, activate
from prisma_core.layout import TokenLayout
from prisma_core.names import LayerQuery, Query, resolve

HookMapping = Mapping["str | LayerQuery", Hook]
Index = int | slice | Sequence[int] | Tensor


class Hooked(nn.Module):
    """A module with hook points.

    Hook points are found wherever a submodule has one as an attribute, and are named by their path.
    """

    def hook_points(self) -> dict[str, HookPoint]:
        """Return every hook point by its full name, in firing order."""
        points = self.__dict__.get("_points")
        if points is None:
            points = dict(sorted(self._walk(), key=lambda item: item[1].order))
            self.__dict__["_points"] = points
        return points

    def _walk(self) -> Iterator[tuple[str, HookPoint]]:
        for path, module in self.named_modules():
            for attribute, value in vars(module).items():
                if isinstance(value, HookPoint):
                    yield (f"{path}.{attribute}" if path else attribute), value

    def resolve(self, query: Query | None) -> list[str]:
        """Return the full names of the hook points a query selects (see ``prisma_core.names``)."""
        points = self.hook_points()
        return resolve(query, list(points), frozenset(name for name, point in points.items() if point.derived))

    def layout_of(self, *inputs: Any) -> TokenLayout | None:
        """Return the token layout a pass over these inputs has, where the model knows one."""
        return None

    # ---------------------------------------------------------------- scopes

    def hooks(
        self, hooks: HookMapping | None = None, *, backward: HookMapping | None = None
    ) -> AbstractContextManager[None]:
        """Return a scope in which the given hooks run at every pass of this model in this thread.

        Args:
            hooks: name, shorthand, glob or ``(shorthand, layer)`` to ``hook(activation, at) -> tensor | None``. A hook
                may edit its activation in place; what it returns, if anything, replaces it.
            backward: the same for gradients, run during the backward pass of anything computed in the scope.

        Raises:
            UnknownName: a name matches no hook point.
        """
        return activate(Scope(edits=self._placed(hooks), backward=self._placed(backward)))

    def _placed(self, hooks: HookMapping | None) -> dict[HookPoint, tuple[tuple[Hook, HookContext], ...]]:
        points = self.hook_points()
        placed: dict[HookPoint, tuple[tuple[Hook, HookContext], ...]] = {}
        for query, hook in (hooks or {}).items():
            if not callable(hook):
                raise HookError(f"The hook for {query!r} is {type(hook).__name__}; expected hook(activation, at).")
            for name in self.resolve([query]):
                point = points[name]
                placed[point] = (*placed.get(point, ()), (hook, HookContext(name, point.axes)))
        return placed

    @contextmanager
    def caching(
        self,
        names: Query | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pos: Index | str | None = None,
        heads: Index | None = None,
        detach: bool = True,
    ) -> Iterator[ActivationCache]:
        """Open a scope that fills a cache during the next pass of this model; works on compiled models too.

        Args:
            names: which activations (see ``prisma_core.names``); None for all that are not derived.
            device: where to keep them; default where they are.
            dtype: what to keep them as; default as they are.
            pos: token positions to keep, or a subset of the layout (``"cls"``, ``"registers"``, ``"patches"``); of
                patterns and scores, the query positions. Axes stay: ``pos=0`` keeps one token.
            heads: heads to keep. Axes stay.
            detach: False keeps the autograd graph.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a second pass runs in the scope.
        """
        cache = ActivationCache({}, model=self, layout=self.layout_of(), pos=pos)
        captures = self._captures(cache, names, device=device, dtype=dtype, pos=pos, heads=heads, detach=detach)
        with activate(Scope(captures=captures)):
            yield cache

    def _captures(
        self, cache: ActivationCache, names: Query | None, *, pos: Index | str | None, heads: Index | None, **how: Any
    ) -> dict[HookPoint, tuple[Capture, ...]]:
        if isinstance(pos, str):
            layout = self.layout_of()
            if layout is None:
                raise HookError(f"This model has no token layout, so pos={pos!r} means nothing; give positions.")
            subset = layout.slice(pos)
            pos = slice(subset.start, None) if subset.stop == layout.n_tokens else subset  # the picture may be larger
        points = self.hook_points()
        captures: dict[HookPoint, tuple[Capture, ...]] = {}
        for name in self.resolve(names):
            point = points[name]
            cuts = () if pos is None and heads is None else _cuts(point.axes, pos, heads)
            captures[point] = (_Keep(cache.store, name, cuts, **how),)
        return captures

    # ---------------------------------------------------------------- runs

    def run_with_hooks(
        self,
        *inputs: Any,
        hooks: HookMapping | None = None,
        backward: HookMapping | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model with hooks (see ``hooks``) and return its output.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a hook returned something unusable, or its hook point was not reached.
        """
        fired: set[str] = set()
        watched = {**self._placed(hooks), **self._placed(backward)}
        captures = {
            point: tuple(_Note(fired, at.name) for _, at in placed) for point, placed in watched.items()
        }
        with self.hooks(hooks, backward=backward), activate(Scope(captures=captures)):
            output = self(*inputs, **kwargs)
        _all_reached([at.name for placed in watched.values() for _, at in placed], fired, kwargs)
        return output

    def run_with_cache(
        self,
        *inputs: Any,
        names: Query | None = None,
        hooks: HookMapping | None = None,
        loss: Callable[[Any], Tensor] | None = None,
        output: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pos: Index | str | None = None,
        heads: Index | None = None,
        detach: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run the model and return its output with a cache of its activations.

        Args:
            inputs: what the model itself takes.
            names, device, dtype, pos, heads, detach: what is cached and how (see ``caching``).
            hooks: hooks to run in the same pass; the cache holds what they made of the activations.
            loss: a function of the output that returns a scalar. Gradients of it by every cached activation are then
                in ``cache.grad``; the output still carries its graph.
            output: False stops the pass after the last activation asked for; the output is then None.
            remove_batch_dim: drop the batch axis of a batch of one.
            kwargs: passed on to the model, such as ``stop_at_layer``.

        Raises:
            UnknownName: a name matches no hook point.
            HookError: a hook point asked for was not reached.
        """
        how: dict[str, Any] = {"device": device, "dtype": dtype, "pos": pos, "heads": heads}
        if loss is not None:
            if not output:
                raise HookError("A loss needs the output: leave output=True.")
            # Gradients are by what flows through the model, so cuts and casts come after the backward pass.
            with torch.enable_grad(), self.hooks(hooks), _leaves(self, names), self.caching(names, detach=False) as raw:
                result = self(*inputs, **kwargs)
                value = loss(result)
            return result, self._with_gradients(raw, value, names, inputs, remove_batch_dim, how)
        wanted = len(self.resolve(names))
        stopper = None if output else _Countdown(wanted)
        with self.hooks(hooks), self.caching(names, detach=detach, **how) as cache:
            if stopper is None:
                result = self(*inputs, **kwargs)
            else:
                result = self._until(stopper, names, inputs, kwargs)
        _all_reached(self.resolve(names), cache.store.keys(), kwargs)
        cache.layout = self.layout_of(*inputs)
        if isinstance(result, Tensor) and any(result is kept for kept in cache.store.values()):
            result = result.clone()
        if remove_batch_dim:
            cache = cache.remove_batch_dim()
        return result, cache

    def _until(self, stopper: Callable[[Tensor], None], names: Query | None, inputs: Any, kwargs: Any) -> None:
        points = self.hook_points()
        try:
            with activate(Scope(captures={points[name]: (stopper,) for name in self.resolve(names)})):
                self.forward(*inputs, **kwargs)
        except Stop:
            pass

    def _with_gradients(
        self,
        raw: ActivationCache,
        value: Tensor,
        names: Query | None,
        inputs: Any,
        remove_batch_dim: bool,
        how: dict[str, Any],
    ) -> ActivationCache:
        if value.numel() != 1:
            raise HookError(f"The loss must be one number; got shape {list(value.shape)}. Pick a logit or take a mean.")
        _all_reached(self.resolve(names), raw.store.keys(), {})
        tensors = list(raw.store.values())
        gradients = torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)
        cache = ActivationCache({}, model=self, layout=self.layout_of(*inputs), pos=how["pos"])
        grads = ActivationCache({}, model=self, layout=cache.layout, pos=how["pos"])
        points = self.hook_points()
        for filled, values in ((cache, tensors), (grads, gradients)):
            for name, tensor, kept in zip(raw.store, tensors, values, strict=True):
                keep = self._captures(filled, [name], **how)[points[name]][0]
                keep(torch.zeros_like(tensor) if kept is None else kept.detach())
        cache.grad = grads
        return cache.remove_batch_dim() if remove_batch_dim else cache


@contextmanager
def _leaves(model: Hooked, names: Query | None) -> Iterator[None]:
    """Make activations asked for part of a graph even where neither input nor weights need gradients."""
    points = model.hook_points()
    context = {name: HookContext(name, points[name].axes) for name in model.resolve(names)}
    with activate(Scope(edits={points[name]: ((_as_leaf, at),) for name, at in context.items()})):
        yield


def _as_leaf(x: Tensor, at: HookContext) -> Tensor:
    return x if x.requires_grad else x.detach().requires_grad_()


def _cuts(axes: str, pos: Any, heads: Any) -> tuple[tuple[int, Any], ...]:
    names = axes.split()
    cuts: list[tuple[int, Any]] = []
    for index, wanted in ((pos, ("pos", "query_pos")), (heads, ("head",))):
        axis = next((names.index(name) for name in wanted if name in names), None)
        if index is not None and axis is not None:
            cuts.append((axis, index))
    return tuple(cuts)


def _cut(x: Tensor, axis: int, index: Any) -> Tensor:
    if isinstance(index, int):
        index = slice(index, index + 1 or None)
    if not isinstance(index, slice):
        return x.index_select(axis, torch.as_tensor(index, device=x.device))
    return x[(slice(None),) * axis + (index,)]


class _Keep:
    """Puts one activation into a store."""

    def __init__(
        self,
        store: dict[str, Tensor],
        name: str,
        cuts: tuple[tuple[int, Any], ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
    ):
        self.store = store
        self.name = name
        self.cuts = cuts
        self.device = device
        self.dtype = dtype
        self.detach = detach

    def __call__(self, x: Tensor) -> None:
        if self.name in self.store:
            raise HookError(f"{self.name} fired twice: a cache holds one pass. Open a new scope for the next one.")
        if self.detach and x.requires_grad:
            x = x.detach()
        if self.cuts:
            whole = x
            for axis, index in self.cuts:
                x = _cut(x, axis, index)
            x = x.clone() if x.numel() < whole.numel() else x  # a view would keep the whole activation alive
        if self.device is not None or self.dtype is not None:
            x = x.to(device=self.device, dtype=self.dtype)
        self.store[self.name] = x


class _Note:
    """Notes that a hook point was reached."""

    def __init__(self, fired: set[str], name: str):
        self.fired = fired
        self.name = name

    def __call__(self, x: Tensor) -> None:
        self.fired.add(self.name)


class _Countdown:
    """Stops the pass at the last of a number of captures."""

    def __init__(self, left: int):
        self.left = left

    def __call__(self, x: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


def _all_reached(names: Sequence[str], seen: Any, kwargs: Mapping[str, Any]) -> None:
    missing = [name for name in names if name not in cast("set[str]", seen)]
    if missing:
        limits = ", ".join(f"{key}={value}" for key, value in kwargs.items() if value is not None)
        raise HookError(
            f"{missing[0]} was not reached in this pass{f' ({limits})' if limits else ''}"
            f"{f', nor were {len(missing) - 1} others' if len(missing) > 1 else ''}. "
            "Ask only for hook points the pass goes through."
        )
